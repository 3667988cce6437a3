"""Toroidal attention as a module for new models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Places, toroidal_attention
from .over_ranks import check_no_dropout, check_no_padding, current_shards
from .ring import toroidal_ring_attention
from .rotary import ring_turns, turn_by_place
from .settings import ToroidalSettings, settings_of
from .terms import TorusTerms


class ToroidalAttention(nn.Module):
    """Self-attention on a torus: (B, N, hidden_size) -> (B, N, hidden_size), at progress 1 from the start.

    Args:
        num_key_value_heads: keys and values are shared by groups of heads; None: each has its own.
        settings: see `ToroidalSettings`; `options` are its fields.
        causal: no token sees a later one.
        rotary: tokens are turned by frequencies that come round once in a period (`ring`), the first half of
            a head's dimensions with the second, or not at all (None).
        dropout: probability with which an attention weight is dropped in training.

    Raises
    ------
    ValueError
        For sizes that do not fit each other, a dropout that is no probability, and settings that do not fit
        the heads.
    """

    turns: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        settings: ToroidalSettings | None = None,
        causal: bool = True,
        bias: bool = False,
        rotary: str | None = "ring",
        dropout: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        settings = settings_of(settings, options)
        groups = num_heads if num_key_value_heads is None else num_key_value_heads
        for name, count in (
            ("hidden_size", hidden_size), ("num_heads", num_heads), ("num_key_value_heads", groups),
        ):  # fmt: skip
            if count < 1:
                raise ValueError(f"{name} is {count}: it must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}: a probability from 0 to below 1 is meant")
        if hidden_size % num_heads or num_heads % groups:
            raise ValueError(
                f"num_heads {num_heads} must divide hidden_size {hidden_size}, and num_key_value_heads "
                f"{groups} must divide num_heads"
            )
        if rotary not in ("ring", None):
            raise ValueError(f"rotary is {rotary!r}: choose 'ring' or None")
        self.head_dim = hidden_size // num_heads
        if rotary is not None and self.head_dim % 2:
            raise ValueError(
                f"rotary={rotary!r} turns pairs of dimensions, and a head has {self.head_dim}: choose "
                "another num_heads, or rotary=None"
            )
        self.causal, self.rotary, self.dropout = causal, rotary, dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.torus = TorusTerms(num_heads, self.head_dim, settings)
        self.torus.set_progress(1.0)
        turns = ring_turns(self.head_dim // 2, settings.period)
        # Whole numbers: no type of the model rounds them.
        self.register_buffer("turns", turns, persistent=False)

    @property
    def settings(self) -> ToroidalSettings:
        """Those of its terms, which `set_backend` changes."""
        return self.torus.settings

    def forward(self, hidden_BNC: Tensor, present_BN: Tensor | None = None) -> Tensor:
        """`present_BN`: bool, False for padding, which nobody attends to; None: there is none.

        Places are counted from the first token that is no padding. Within `aiether.toroidal.sharded` the
        tokens are this rank's share of a longer sequence, without padding.

        Raises
        ------
        ValueError
            If there are no tokens, or `present_BN` is not of type bool.
        """
        if not hidden_BNC.shape[1]:
            raise ValueError(f"hidden_BNC is {tuple(hidden_BNC.shape)}: there is no token to attend")
        if present_BN is not None and present_BN.dtype is not torch.bool:
            raise ValueError(f"present_BN is of type {present_BN.dtype}: give present_BN.bool()")
        query, key, value = (
            projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(hidden_BNC), self.k_proj(hidden_BNC), self.v_proj(hidden_BNC))
        )
        places = self._places(hidden_BNC, present_BN)
        if self.rotary is not None:
            query, key = (
                turn_by_place(each, places.query, self.turns, self.settings.period) for each in (query, key)
            )
        platters = self._attend(query, key, value, places)
        return self.o_proj(self.torus.fuse(platters).flatten(3).transpose(1, 2).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, places: Places) -> Tensor:
        terms, scale = self.torus(query), self.head_dim**-0.5
        dropout = self.dropout if self.training else 0.0
        shards = current_shards()
        if shards is None:
            return toroidal_attention(
                query, key, value, terms, self.settings, places, scale=scale, dropout=dropout
            )
        check_no_dropout(dropout)
        return toroidal_ring_attention(
            query, key, value, terms, self.settings, shards, causal=self.causal, scale=scale
        )

    def _places(self, hidden_BNC: Tensor, present_BN: Tensor | None) -> Places:
        shards = current_shards()
        if shards is not None:
            check_no_padding(present_BN)
            shards.check_share(hidden_BNC.shape[1])
            places = shards.positions(hidden_BNC.device)
            return Places(places, places, causal=self.causal)
        length = hidden_BNC.shape[1]
        places = torch.arange(length, device=hidden_BNC.device)
        if present_BN is None:
            return Places(places, places, causal=self.causal, known_by=(length, length))
        places = places - present_BN.long().argmax(-1, keepdim=True)
        return Places(places, places, present_BN[:, None, None, :], self.causal)
