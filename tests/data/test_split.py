from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiether.data.split import validation_keys

documents = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 10_000)), min_size=2, max_size=80)


def split(entries: list[tuple[int, int]], fraction: float) -> list[int]:
    keys, sizes = zip(*entries, strict=True)
    return validation_keys(np.array(keys, dtype=np.uint64), np.array(sizes), fraction).tolist()


@given(documents.filter(lambda found: len(dict(found)) > 1), st.floats(0.001, 0.5))
def test_neither_side_is_empty_and_the_share_is_kept(entries: list[tuple[int, int]], fraction: float) -> None:
    held_out = set(split(entries, fraction))
    keys = {key for key, _ in entries}
    assert held_out
    assert held_out < keys
    taken = sum(size for key, size in entries if key in held_out)
    smallest = min(sum(size for key, size in entries if key == one) for one in keys)
    assert taken <= max(fraction * sum(size for _, size in entries), smallest)


@given(documents.filter(lambda found: len(dict(found)) > 1), st.randoms())
def test_order_does_not_matter(entries: list[tuple[int, int]], shuffle) -> None:
    shuffled = list(entries)
    shuffle.shuffle(shuffled)
    assert split(shuffled, 0.1) == split(entries, 0.1)


def test_many_documents_give_the_share_asked_for() -> None:
    keys = np.random.default_rng(0).integers(0, 2**63, 5000).astype(np.uint64)
    sizes = np.random.default_rng(1).integers(100, 5000, 5000)
    held_out = np.isin(keys, validation_keys(keys, sizes, 0.02))
    assert 0.018 <= sizes[held_out].sum() / sizes.sum() <= 0.02


@given(st.floats(0.001, 0.5), st.integers(0, 20))
def test_looking_at_the_lowest_hashes_first_changes_nothing(fraction: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.integers(0, 2**64, 300, dtype=np.uint64)
    sizes = random.integers(1, 10 ** random.integers(1, 5), 300)
    target, taken, chosen = fraction * sizes.sum(), 0, []
    for index in np.argsort(keys):  # the rule as it is written, over everything
        if taken >= 0.9 * target:
            break
        if taken + sizes[index] <= target:
            chosen.append(int(keys[index]))
            taken += sizes[index]
    found = validation_keys(keys, sizes, fraction).tolist()
    assert found == (chosen or [int(keys[np.argsort(keys)[sizes[np.argsort(keys)].argmin()]])])


def test_one_document_many_times_cannot_be_split() -> None:
    with pytest.raises(ValueError, match=r"holds 1 different document\(s\); at least 2"):
        split([(5, 10)] * 9, 0.1)
