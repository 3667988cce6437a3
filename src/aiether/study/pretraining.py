"""The model that a study of retrofitted models begins with: trained once, where its runs are done."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from .arms import pretrain_config
from .cell import base_of, is_finished
from .pool import Backend, Order
from .queue import Observer
from .spec import StudySpec
from .state import progress_of

_POLL_S, _LOOK_S = 0.5, 2.0
_PHASE = "training the model that the study begins with"


def pretrain(spec: StudySpec, study_dir: Path, place: Backend, observer: Observer) -> None:
    """Train it, or go on with it, and tell how far that is; nothing for other studies, and where it is there.

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
        ended, looked = [], -_LOOK_S
        while not ended:
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                step, total = progress_of(folder)
                observer.preparing(_PHASE, step / total if total else 0.0)
            ended = place.wait(_POLL_S)
    except KeyboardInterrupt:
        list(place.interrupt())
        raise
    outcome = ended[0][1]
    if outcome.status == "interrupted":
        raise KeyboardInterrupt
    if outcome.status == "failed":
        raise ValueError(f"the model that the study begins with could not be trained: {outcome.reason}")
