"""Where growth meets training loops: stages on the Hugging Face Trainer, and checkpoints that are whole."""

from ._checkpoint import Checkpoint, CheckpointStore, write_json
from ._growth_callback import GrowthCallback
from ._head import causal_loss
from ._observer import Row, RunObserver
from ._quiet import without_progress_bars
from ._verify import GrowthError
from .trainer import FitResult, fit

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "FitResult",
    "GrowthCallback",
    "GrowthError",
    "Row",
    "RunObserver",
    "causal_loss",
    "fit",
    "without_progress_bars",
    "write_json",
]
