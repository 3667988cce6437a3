"""Model FLOPs utilisation: what a model's training FLOPs a second are of what the GPU could do."""

from __future__ import annotations

PEAK_BF16_FLOPS_PER_S = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
}
"""Dense bf16 peak by the vendor's datasheet, by a part of the name; the first that fits counts."""


def mfu(flops_per_s: float, gpu_name: str) -> float | None:
    """Share of a GPU's dense bf16 peak, of one GPU; None for a GPU that is not known.

    Recomputation does not count: FLOPs are those of the model (Chowdhery et al. 2022, appendix B).
    """
    peak = next((peak for name, peak in PEAK_BF16_FLOPS_PER_S.items() if name in gpu_name), None)
    return None if peak is None else flops_per_s / peak
