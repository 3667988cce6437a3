"""Key-value caches of layers that do not see every token, as layers of transformers' own `Cache`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .ledger import Ledger, Turn
from .selection import Budget, Slots
from .static_cache import StaticCompactLayer

_STEP = 16
"""The capacity of a compact cache grows by multiples of so many slots."""


class CompactLayer(CacheLayerMixin):
    """Keys and values of the tokens that a routed layer processed; a skipped token writes nothing.

    Rows hold different numbers of tokens, at the front of a common capacity. It is told what comes in one of
    two ways: `expect`, whose capacity follows from the number of tokens that were seen and the layer's
    budget, so that no length is read back from a device; or `take`, for one token of some of the rows, where
    what the rows hold is counted on the host.

    Attributes
    ----------
    keys, values: (B, heads, capacity, head_dim).
    used_B, present_B: int64, tokens that each row holds, and those that went by, padding aside.
    places_BC: int64, the place of the token in each slot, padding counted.
    seen: tokens that went by, padding included.
    tuples: whether the decoder layer that fills it returns its hidden states in a tuple.

    Args:
        window: a token attends to those that are fewer places away; None: to all before it.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, budget: Budget, window: int | None = None) -> None:
        super().__init__()
        self.budget, self.window = budget, window
        self.seen = 0
        self.tuples = False
        self._slots: Slots | None = None
        self._turn: Turn | None = None
        self._ledger: Ledger | None = None  # while there is one, it and not the three tensors is right
        self._counts: tuple[Tensor, Tensor, Tensor]

    @property
    def used_B(self) -> Tensor:
        return self._counted()[0]

    @property
    def present_B(self) -> Tensor:
        return self._counted()[1]

    @property
    def places_BC(self) -> Tensor:
        return self._counted()[2]

    @property
    def started(self) -> bool:
        """Whether any token went by."""
        return self.seen > 0

    def num_slots(self, length: int) -> int:
        """How many of the next `length` tokens may be processed."""
        return min(length, self.budget.after(self.seen + length))

    def _counted(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._ledger is not None:
            self._counts, self._ledger = self._ledger.tensors(self.device), None
        return self._counts

    def ledger(self, threshold: Tensor | None) -> Ledger:
        """What the rows hold, and the layer's threshold: read from the device once, then kept on the host."""
        if self._ledger is None:
            self._ledger = Ledger.of(*self._counts, threshold)
            assert self.keys is not None
            assert self.values is not None
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()
        return self._ledger

    def take(self, rows_A: np.ndarray, like: Tensor) -> Turn:
        """Announce the token that the ledger has just counted in these rows; the next `update` brings it."""
        assert self._ledger is not None
        assert self.keys is not None
        assert self.values is not None
        turn = self._turn = self._ledger.turn(rows_A, self.keys.shape[1], self.window, like)
        self.keys, self.values = (turn.made_room(held) for held in (self.keys, self.values))
        return turn

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, 0, head_dim)
        self.values = value_states.new_zeros(batch, heads, 0, value_states.shape[-1])
        self.is_initialized = True

    def expect(self, slots: Slots, present_BT: Tensor) -> Tensor | None:
        """Announce the tokens that the next `update` brings; returns which columns each slot may attend to.

        bool (B, 1, K, capacity); None where the slots are the first tokens there are: causal among
        themselves.
        """
        self._slots, self._first = slots, self.seen == 0
        if self._first:
            zeros_B = torch.zeros_like(slots.count_B)
            self._ledger, self._counts = None, (zeros_B, zeros_B, slots.index_BK[:, :0])
        used_B, present_B, places_BC = self._counted()
        places_BK = self.seen + slots.index_BK
        self.seen += present_BT.shape[-1]
        self._capacity = -(-self.budget.after(self.seen) // _STEP) * _STEP
        self._capacity = max(self._capacity, places_BC.shape[-1])
        rank_K = torch.arange(slots.index_BK.shape[-1], device=places_BK.device)
        own_BK = used_B[:, None] + rank_K
        # An empty slot writes into one column behind the last, which is cut off again.
        self._column_BK = torch.where(slots.filled_BK, own_BK, self._capacity)
        places_BC = self._with(places_BC[:, None, :, None], places_BK[:, None, :, None])[:, 0, :, 0]
        self._counts = (used_B, present_B + present_BT.sum(-1), places_BC)
        if self._first:
            return None
        column_C = torch.arange(self._capacity, device=own_BK.device)
        allowed_BKC = column_C <= own_BK[..., None]
        if self.window is not None:
            near_BKC = places_BK[..., None] - places_BC[:, None] < self.window
            allowed_BKC = allowed_BKC & (near_BKC | (column_C == own_BK[..., None]))
        return allowed_BKC[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the filled slots behind what each row holds; returns what the slots attend to."""
        if self._turn is not None:
            turn, self._turn = self._turn, None
            assert self.keys is not None
            assert self.values is not None
            return turn.write(self.keys, key_states), turn.write(self.values, value_states)
        assert self._slots is not None, "expect() or take() comes first"
        slots, self._slots = self._slots, None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._with(self.keys, key_states), self._with(self.values, value_states)
        used_B, present_B, places_BC = self._counts
        self._counts = (used_B + slots.count_B, present_B, places_BC)
        return (key_states, value_states) if self._first else (self.keys, self.values)

    def _with(self, held_BHCX: Tensor | None, new_BHKX: Tensor) -> Tensor:
        """What was held, at the present capacity, with the announced slots written into it."""
        assert held_BHCX is not None
        missing = self._capacity - held_BHCX.shape[-2]
        padded = torch.nn.functional.pad(held_BHCX, (0, 0, 0, missing + 1))
        index = self._column_BK[:, None, :, None].expand_as(new_BHKX)
        return padded.scatter(2, index, new_BHKX.to(held_BHCX.dtype))[:, :, :-1]

    def get_seq_length(self) -> int:
        """Tokens that were seen: what positions and masks of the other layers are counted from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.seen, self._ledger = False, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.is_initialized:
            assert self.keys is not None
            assert self.values is not None
            indices = indices.to(self.keys.device)
            self.keys, self.values = self.keys[indices], self.values[indices]
            if self._ledger is not None:
                self._ledger.select(indices.cpu().numpy())
            else:
                used_B, present_B, places_BC = self._counts
                self._counts = (used_B[indices], present_B[indices], places_BC[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        if self.is_initialized:
            assert self.keys is not None
            self.batch_select_indices(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens that were seen (their number, negative as in transformers)."""
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        removed = abs(tokens_to_remove)
        self.seen -= removed
        used_B, present_B, places_BC = self._counted()
        slot_C = torch.arange(places_BC.shape[-1], device=used_B.device)
        kept_BC = (slot_C < used_B[:, None]) & (places_BC < self.seen)
        # Padding is on the left, never among the last.
        self._counts = (kept_BC.sum(-1), present_B - removed, places_BC)


class LatentLayer(CacheLayerMixin):
    """Keys and values of a block that is applied again and again: one dense cache for each iteration.

    A token that stopped early is seen at deeper iterations as it was at its last one.

    Args:
        max_cache_len: tokens that fixed tensors have room for; None: the tensors grow.
    """

    is_sliding = False

    def __init__(self, num_iterations: int, max_cache_len: int | None = None) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self.is_compileable = max_cache_len is not None
        self.is_croppable = not self.is_compileable
        self.iterations: list[Any] = [self._empty() for _ in range(num_iterations)]

    def _empty(self) -> DynamicLayer | StaticLayer:
        return DynamicLayer() if self.max_cache_len is None else StaticLayer(self.max_cache_len)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, iteration: int = 0, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to one iteration's cache; returns all that it holds."""
        self.is_initialized = True
        return self.iterations[iteration].update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.iterations[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.iterations[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    def reset(self) -> None:
        if self.max_cache_len is None:
            self.iterations = [self._empty() for _ in self.iterations]  # whose own reset may keep its length
        for layer in self.iterations:
            layer.reset()
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.iterations:
            layer.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.iterations:
            layer.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.iterations:
            layer.batch_repeat_interleave(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.iterations:
            layer.crop(tokens_to_remove)


def compact_layer(
    cache: Cache, index: int, budget: Budget, window: int | None
) -> CompactLayer | StaticCompactLayer:
    """The cache's layer `index` as a routed layer's, put in place of transformers' own when first needed.

    Raises
    ------
    ValueError
        For a cache that holds something else there, such as a quantized one, or that moves its layers away.
    """
    found = _layer(cache, index)
    if isinstance(found, CompactLayer | StaticCompactLayer):
        return found
    length = _room(cache, index, found, window)
    own = CompactLayer(budget, window) if length is None else StaticCompactLayer(budget, length)
    cache.layers[index] = own
    return own


def latent_layer(cache: Cache, index: int, num_iterations: int) -> LatentLayer:
    """The cache's layer `index` as a latent block's; raises as `compact_layer` does."""
    found = _layer(cache, index)
    if not isinstance(found, LatentLayer):
        length = _room(cache, index, found, None)
        cache.layers[index] = found = LatentLayer(num_iterations, length)
    return found


def _layer(cache: Cache, index: int) -> Any:
    """The layer; where there are too few, more of the cache's kind."""
    while len(cache.layers) <= index:
        static = bool(cache.layers) and cache.is_compileable
        cache.layers.append(StaticLayer(cache.get_max_length()) if static else DynamicLayer())
    return cache.layers[index]


def _room(cache: Cache, index: int, found: Any, window: int | None) -> int | None:
    """How many tokens a static layer that is still unused has room for; None for a dynamic one."""
    used = getattr(found, "is_initialized", False)
    if cache.offloading:
        raise ValueError(
            "the cache moves its layers to the CPU and back (offloaded): layers with adaptive depth cannot; "
            "leave cache_implementation out, or take cache_implementation='static'"
        )
    if not used and type(found) in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    if type(found) is StaticSlidingWindowLayer and found.max_cache_len == window:
        raise ValueError(
            f"layer {index} attends to a window of {window} tokens, not more than the static cache has room "
            "for: a routed layer's static cache knows no window; leave cache_implementation out"
        )
    if not used and type(found) in (StaticLayer, StaticSlidingWindowLayer):
        return found.max_cache_len
    raise ValueError(
        f"layer {index} of the cache is a {type(found).__name__}{' that is in use' if used else ''}: layers "
        "with adaptive depth need transformers' DynamicCache or StaticCache, empty at the start (leave "
        "cache_implementation out, or take cache_implementation='static' without prefill_chunk_size)"
    )
