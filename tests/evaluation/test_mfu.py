"""Model FLOPs utilisation."""

from __future__ import annotations

import pytest

from aiether.evaluation import mfu


def test_it_is_the_share_of_the_datasheet_s_peak() -> None:
    assert mfu(98.9e12, "NVIDIA H100 80GB HBM3") == pytest.approx(0.1)
    assert mfu(98.9e12, "NVIDIA H200") == pytest.approx(0.1)
    assert mfu(75.6e12, "NVIDIA H100 PCIe") == pytest.approx(0.1)


def test_of_a_gpu_that_is_not_known_nothing_is_said() -> None:
    assert mfu(1e12, "AMD EPYC") is None
