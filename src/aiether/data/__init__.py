"""Text in, packed tokens out."""

from __future__ import annotations

from aiether.data.config import DataConfig
from aiether.data.prepare import PackedData, Progress, prepare
from aiether.data.tokens import TokenFile
from aiether.data.windows import TokenWindows

__all__ = ["DataConfig", "PackedData", "Progress", "TokenFile", "TokenWindows", "prepare"]
