from __future__ import annotations

from pathlib import Path

import pytest
from tests.integrations.tiny import tiny_model, tiny_trainer


@pytest.fixture(scope="session")
def trainer_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a real Trainer: a 6-layer Llama with checkpoints at steps 4, 8 and 12 of 12."""
    folder = tmp_path_factory.mktemp("trainer")
    tiny_trainer(folder, tiny_model("llama", 6, dropout=0.0), max_steps=12, save_steps=4).train()
    return folder / "run"
