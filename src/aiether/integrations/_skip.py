"""Which step's batch a run leaves out after an update that ruined it, or why it stops instead."""

from __future__ import annotations

from collections.abc import Sequence

from ._checkpoint import Checkpoint
from ._fault import RunFault
from ._finite import NotFinite
from ._observer import Row


def skip_after(
    fault: NotFinite, skips: Sequence[Row], checkpoint: Checkpoint | None, *, max_skipped_steps: int
) -> Row:
    """The event of leaving out the batch of the step at fault, after going back to `checkpoint`.

    Raises
    ------
    RunFault
        If too many are left out already, or the checkpoint holds what that step has done.
    """
    skipped = {skip["step"] for skip in skips}
    culprit = fault.step + 1
    while culprit in skipped:  # it did nothing, so an update before it ruined what came after
        culprit -= 1
    too_late = checkpoint is None or culprit <= checkpoint.step
    if too_late or len(skipped) >= max_skipped_steps:
        raise RunFault(
            f"{told(fault)}, with {len(skipped)} of at most {max_skipped_steps} steps skipped already",
            "Raise max_skipped_steps (or start anew with a lower learning rate, and look at the data)",
            checkpoint and checkpoint.path,
        )
    assert checkpoint is not None
    skip = {"event": "skip", "step": culprit, "reason": fault.what}
    return skip | {"back_to_step": checkpoint.step}


def told(fault: NotFinite) -> str:
    return f"step {fault.step + 1}: {fault.what}"
