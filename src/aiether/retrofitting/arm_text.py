"""The text that an arm of a study of retrofitted models is tuned on."""

from __future__ import annotations

from dataclasses import replace

from aiether.data import PackedData, TokenWindows, prepare
from aiether.training.config import TrainConfig

from .arm_settings import ArmSettings

TUNED_ON = "tuned_on"
"""In a run's environment.json: the text of its own that it was tuned on."""


def text_of(arm: ArmSettings, config: TrainConfig, data: PackedData) -> PackedData:
    """The arm's own text in the tokens of the study's, or the study's.

    Raises
    ------
    ValueError
        For a text that cannot be read, that needs a tokenizer where the study has none, or whose tokens the
        study's model does not have.
    """
    if arm.dataset_path is None:
        return data
    tokenizer = None if data.tokenizer_dir is None else str(data.tokenizer_dir)
    own = prepare(replace(config, dataset_path=arm.dataset_path, dataset_weights=None, tokenizer=tokenizer))
    if tokenizer is None and own.tokenizer_dir is not None:
        raise ValueError(
            f"retrofit's dataset_path is {arm.dataset_path!r}, a text, and the study's tokens come without a "
            "tokenizer to read it with: give tokens made alike (benchmarks/texts.py makes them), or a "
            "tokenizer"
        )
    if own.vocab_size > data.vocab_size:
        raise ValueError(
            f"retrofit's dataset_path is {arm.dataset_path!r}, whose tokens go up to {own.vocab_size - 1}, "
            f"and the study's model has {data.vocab_size} of them: give tokens of the same tokenizer"
        )
    return own


def windows_of(arm: ArmSettings, config: TrainConfig, text: PackedData) -> tuple[TokenWindows, int]:
    """The windows of the text's training side in the seed's order, and how many of them are tuned on.

    Raises
    ------
    ValueError
        If the text has fewer than `train_size`.
    """
    windows = TokenWindows(text.train, config.context_length, config.seed)
    count = len(windows) if arm.train_size is None else arm.train_size
    if count > len(windows):
        raise ValueError(f"train_size is {count}, and the text holds {len(windows)} windows: lower it")
    return windows, count
