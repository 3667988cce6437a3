"""Seeded text for the tests of this folder."""

from __future__ import annotations

import random

WORDS = [
    "river",
    "stone",
    "lantern",
    "quiet",
    "morning",
    "carry",
    "under",
    "seven",
    "bright",
    "glass",
    "open",
]


def make_document(seed: int, paragraphs: int = 6) -> str:
    """A document of a few hundred characters that no other seed gives."""
    words = random.Random(seed)
    body = "\n\n".join(" ".join(words.choices(WORDS, k=12)) for _ in range(paragraphs))
    return f"Number {seed}\n\n{body}\n"
