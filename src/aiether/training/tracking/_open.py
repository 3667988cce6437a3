"""The trackers by name, and whether this machine can use them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from ._tensorboard import TensorBoard
from ._tracking import OpenTracker
from ._trackio import Trackio
from ._wandb import WeightsAndBiases

TRACKERS: dict[str, OpenTracker] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}
_CHECKS = {"wandb": WeightsAndBiases.check, "trackio": Trackio.check}


def check_trackers(names: Iterable[str]) -> dict[str, OpenTracker]:
    """The trackers named, all of them usable here.

    Raises
    ------
    ValueError
        If one's library is not installed, or it would not take a run as it is set up.
    """
    names = [name for name in names if name != "none"]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to names {name}, which is not installed: pip install 'aiether[{name}]'")
        if name in _CHECKS:
            _CHECKS[name]()
    return {name: TRACKERS[name] for name in names}
