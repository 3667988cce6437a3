"""Where growth meets training loops: stages on the Hugging Face Trainer, and checkpoints that are whole."""

from ._budget import Replan, Spent, StepBudget
from ._checkpoint import Checkpoint, CheckpointStore
from ._fault import OutOfMemory, RunFault, disk_full, is_disk_full
from ._files import sync_file, whole_folder, write_json
from ._grow import grow
from ._grow_report import FunctionChange, GrowthReport
from ._growth_callback import GrowthCallback
from ._head import causal_loss
from ._interrupt import Interrupted, interrupted_status, raise_interrupts
from ._lock import hold
from ._lr_policy import Rewarm
from ._memory import Workload, check_memory
from ._observer import Row, RunObserver
from ._quiet import without_progress_bars
from ._result import FitResult
from ._run import OnNan
from ._verify import GrowthError
from ._weights import check_weights, read_mapping
from .trainer import fit

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "FitResult",
    "FunctionChange",
    "GrowthCallback",
    "GrowthError",
    "GrowthReport",
    "Interrupted",
    "OnNan",
    "OutOfMemory",
    "Replan",
    "Rewarm",
    "Row",
    "RunFault",
    "RunObserver",
    "Spent",
    "StepBudget",
    "Workload",
    "causal_loss",
    "check_memory",
    "check_weights",
    "disk_full",
    "fit",
    "grow",
    "hold",
    "interrupted_status",
    "is_disk_full",
    "raise_interrupts",
    "read_mapping",
    "sync_file",
    "whole_folder",
    "without_progress_bars",
    "write_json",
]
