"""The model that a study of retrofitted models begins with: trained once, where its runs are done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .arms import pretrain_config
from .cell import base_of, is_finished
from .pool import Backend, Order
from .spec import StudySpec

_POLL_S = 0.5


def pretrain(spec: StudySpec, study_dir: Path, place: Backend) -> None:
    """Train it, or go on with it; nothing for other studies, and where it is there.

    Raises
    ------
    ValueError
        If its training failed.
    KeyboardInterrupt
        For a signal, after it has saved.
    """
    if spec.pretrain is None:
        return
    folder = base_of(study_dir).parent
    if is_finished(folder):
        return
    place.submit(Order(folder, asdict(pretrain_config(spec)), keep_models=True))
    try:
        ended = place.wait(_POLL_S)
        while not ended:
            ended = place.wait(_POLL_S)
    except KeyboardInterrupt:
        list(place.interrupt())
        raise
    outcome = ended[0][1]
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.status == "failed":
        raise ValueError(f"the model that the study begins with could not be trained: {outcome.reason}")
