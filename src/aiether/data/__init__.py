"""Text or tokens in, packed tokens out."""

from __future__ import annotations

from aiether.data._several import prepare_mixture
from aiether.data.config import DataConfig
from aiether.data.mixture import TokenMixture
from aiether.data.packed import PackedData
from aiether.data.prepare import Progress, prepare_source, silent
from aiether.data.tokens import TokenFile
from aiether.data.whole import WholeText, whole_text
from aiether.data.windows import TokenWindows

__all__ = [
    "DataConfig",
    "PackedData",
    "Progress",
    "TokenFile",
    "TokenMixture",
    "TokenWindows",
    "WholeText",
    "prepare",
    "whole_text",
]


def prepare(config: DataConfig, progress: Progress | None = None) -> PackedData:
    """Give the packed tokens that `config` describes, from the cache or made now.

    The same content, settings and version give the same tokens. Preparation is atomic: until it is done,
    what is in the cache does not change; one that was interrupted is taken up where it was. Processes that
    ask for the same data at once wait for the first of them.

    Raises ValueError for data that cannot be used (missing, empty, binary, not UTF-8, too little).
    """
    config.validate()
    if len(config.dataset_paths) == 1:
        [path] = config.dataset_paths
        return prepare_source(path, config, progress or silent)
    return prepare_mixture(config, progress or silent)
