"""The first pass over a source: what there is, and a sample to train a tokenizer on."""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt

from aiether.data.sources import ReadProgress, Section, Source
from aiether.data.split import Keys, validation_keys

SECTION_SIZE = 1 << 12
"""Characters or ids of a section, the unit of the split when there are few documents."""
DOCUMENT_PIECE_SIZE = 1 << 18
MIN_DOCUMENTS = 32
"""With fewer documents than this, the split is made by section."""
SAMPLE_BYTES = 12 << 20
"""How much text a tokenizer is trained on at most."""
_STRETCH = 1 << 20
_WHITE_SPACE = bytes(code for code in range(128) if chr(code).isspace())


@dataclass
class Units:
    """Content keys and sizes of documents or sections, in order."""

    keys: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))

    @classmethod
    def from_arrays(cls, keys: Keys, sizes: Keys) -> Units:
        """Units whose keys and sizes, (N,) each, were kept as arrays."""
        return cls(array("Q", keys.tobytes()), array("Q", sizes.tobytes()))

    def add(self, key: int, size: int) -> None:
        """Note the next unit."""
        self.keys.append(key)
        self.sizes.append(size)


@dataclass
class Scan:
    """What the first pass learned; sizes are bytes of text, or ids."""

    documents: Units = field(default_factory=Units)
    sections: Units = field(default_factory=Units)
    sample: list[tuple[int, int, int, str]] = field(default_factory=list)  # -key, section, document, text
    max_id: int = -1

    @property
    def by_document(self) -> bool:
        """Whether whole documents are split between the sides, instead of sections."""
        return len(self.documents.keys) >= MIN_DOCUMENTS

    @property
    def units(self) -> Units:
        """What is split between training and validation."""
        return self.documents if self.by_document else self.sections

    def read(self, source: Source, limit: int, on_read: ReadProgress) -> Iterator[tuple[int, Section]]:
        """The source's pieces again, each with the number of the unit that it belongs to."""
        numbers = count()
        unit = next(numbers)
        for section in source.sections(limit if self.by_document else SECTION_SIZE, on_read):
            yield unit, section
            if section.last or not self.by_document:
                unit = next(numbers)

    def validation(self, fraction: float) -> npt.NDArray[np.bool_]:
        """For each unit, whether it is held out: (units,)."""
        keys: Keys = np.asarray(self.units.keys, dtype=np.uint64)
        sizes = np.asarray(self.units.sizes, dtype=np.uint64).astype(np.int64)
        chosen = validation_keys(keys, sizes, fraction)
        held_out = np.empty(len(keys), dtype=np.bool_)
        for start in range(0, len(keys), _STRETCH):
            some = keys[start : start + _STRETCH]
            place = np.minimum(np.searchsorted(chosen, some), len(chosen) - 1)
            held_out[start : start + _STRETCH] = chosen[place] == some
        return held_out

    def training_sample(self, held_out: npt.NDArray[np.bool_]) -> list[str]:
        """The sampled sections that lie on the training side, in the order of the source."""
        ordered = sorted((section, document, text) for _, section, document, text in self.sample)
        return [
            text
            for section, document, text in ordered
            if not held_out[document if self.by_document else section]
        ]


def scan(source: Source, keep_sample: bool, on_read: ReadProgress) -> Scan:
    """Read a source once.

    The sample is the sections with the lowest content hashes up to SAMPLE_BYTES: it is spread over the
    whole source and depends on nothing but the text. White space does not count in a hash, so that the
    same words wrapped differently are the same document. What is held in memory is the sample and 16 bytes
    a document (a section, while there are few documents).
    """
    found = Scan()
    digest, size, sampled = hashlib.blake2b(digest_size=8), 0, 0
    for number, section in enumerate(source.sections(SECTION_SIZE, on_read)):
        content, nbytes = _content(section)
        key = _key(hashlib.blake2b(content, digest_size=8))
        if not isinstance(section.content, str):
            found.max_id = max(found.max_id, int(section.content.max()))
        elif keep_sample:
            heapq.heappush(found.sample, (-key, number, len(found.documents.keys), section.content))
            sampled += len(section.content)
            while sampled > SAMPLE_BYTES:
                sampled -= len(heapq.heappop(found.sample)[-1])
        if not found.by_document:
            found.sections.add(key, nbytes)
        digest.update(content)
        size += nbytes
        if section.last:
            found.documents.add(_key(digest), size)
            digest, size = hashlib.blake2b(digest_size=8), 0
            if found.by_document:
                found.sections = Units()
    return found


def _content(section: Section) -> tuple[bytes, int]:
    """The bytes that identify a section, and its size."""
    if isinstance(section.content, str):
        encoded = section.content.encode()
        if len(encoded) == len(section.content):  # ASCII
            return encoded.translate(None, _WHITE_SPACE), len(encoded)
        return "".join(section.content.split()).encode(), len(encoded)
    return section.content.tobytes(), len(section.content)


def _key(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")
