"""A small text of seeded words: documents that differ, from words of unequal frequency."""

from __future__ import annotations

import random
import string
from pathlib import Path


def write_corpus(path: Path, documents: int = 150, words_each: int = 60, seed: int = 0) -> Path:
    chance = random.Random(seed)
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 8))) for _ in range(200)]
    frequencies = [1 / (rank + 1) for rank in range(200)]
    texts = (" ".join(chance.choices(words, frequencies, k=words_each)) for _ in range(documents))
    path.write_text("\n<|endoftext|>\n".join(texts))
    return path
