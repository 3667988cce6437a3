"""One folder of tokens out of several texts, to take to a machine that has neither them nor a network.

    python benchmarks/texts.py runs/gpu wikipedia.txt.xz gutenberg.txt.xz --vocab_size 16384
    python benchmarks/texts.py runs/stories train.txt --held_out valid.txt --tokenizer gpt2_bpe/

Writes train.bin, val.bin (uint16) and tokenizer/ into the folder, which `dataset_path` takes. Held out are
the given texts, or the share of each that `aiether.data` sets aside, which `--held_out` leaves out; the parts
of several texts lie one behind the other. GPU presets look at 480 or 640 held-out windows of 512 tokens.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aiether.data import DataConfig, PackedData, TokenFile, TokenMixture, prepare


def packed(texts: tuple[str, ...], settings: argparse.Namespace, **options: Any) -> PackedData:
    """The texts as tokens, in the cache."""
    return prepare(DataConfig(dataset_path=texts, cache_dir=settings.cache_dir, **options))


def files(tokens: TokenFile | TokenMixture) -> list[Path]:
    """The files that hold them."""
    parts = tokens.parts if isinstance(tokens, TokenMixture) else (tokens,)
    return [part.path for part in parts]


def join(paths: Iterable[Path], to: Path) -> None:
    """Their bytes one behind the other."""
    with to.open("wb") as joined:
        for path in paths:
            with path.open("rb") as file:
                shutil.copyfileobj(file, joined)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--held_out", nargs="+")
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--tokenizer", help="instead of a new one of `vocab_size`")
    parser.add_argument("--cache_dir")
    settings = parser.parse_args()
    if any(name.endswith(".bin") for name in (*settings.texts, *(settings.held_out or ()))):
        raise SystemExit("a .bin file holds tokens already: name texts")
    asked = {"tokenizer": settings.tokenizer} if settings.tokenizer else {"vocab_size": settings.vocab_size}
    data = packed(tuple(settings.texts), settings, **asked)
    if data.vocab_size > 2**16:
        raise SystemExit(f"{data.vocab_size} tokens do not fit uint16: choose a smaller vocabulary")
    assert data.tokenizer_dir is not None
    validation = files(data.validation)
    if settings.held_out:
        own = packed(tuple(settings.held_out), settings, tokenizer=str(data.tokenizer_dir))
        validation = [*files(own.train), *files(own.validation)]
    settings.folder.mkdir(parents=True, exist_ok=True)
    join(files(data.train), settings.folder / "train.bin")
    join(validation, settings.folder / "val.bin")
    shutil.copytree(data.tokenizer_dir, settings.folder / "tokenizer", dirs_exist_ok=True)
    for name in ("train", "val"):
        tokens = (settings.folder / f"{name}.bin").stat().st_size // 2
        print(f"{name}: {tokens:,} tokens, {tokens // 512:,} windows of 512")


if __name__ == "__main__":
    main()
