"""A model whose inputs are this rank's share of a longer sequence computes what it would on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .ring import ring_attention, toroidal_ring_attention
from .shards import SequenceShards
from .terms import TorusTerms

_active: list[SequenceShards] = []
"""Not bound to a thread: gradient checkpointing computes layers anew in a thread of autograd's."""


@contextmanager
def sharded(shards: SequenceShards, model: nn.Module | None = None) -> Iterator[SequenceShards]:
    """Attention within is over the whole sequence: of `ToroidalAttention`, and of a decoder of transformers.

    A decoder is given its shard's position_ids, and refuses inputs whose meaning sharding would change. All
    its attention goes over the ranks, toroidal or not; it must have been converted, or call
    `model.set_attn_implementation("aiether_toroidal")`. Call `backward` within too: gradient checkpointing
    computes the layers anew.

    Args:
        model: the decoder, or what is wrapped around it; None: there are only modules of ours.

    Raises
    ------
    ValueError
        If the decoder's attention, or its positions, cannot be sharded.
    """
    hook = None if model is None else _prepare(model, shards)
    _active.append(shards)
    try:
        yield shards
    finally:
        _active.pop()
        if hook is not None:
            hook.remove()


def current_shards() -> SequenceShards | None:
    """How the sequence is sharded at present; None: it is whole."""
    return _active[-1] if _active else None


def attend_over_shards(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    shards: SequenceShards,
) -> Tensor:
    """The attention of a decoder's layer, (B, N, H, X): plain in other layers and at progress 0."""
    check_no_dropout(dropout)
    if mask is not None:
        raise ValueError("a sharded sequence is plainly causal: leave attention_mask out")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    terms: TorusTerms | None = getattr(module, "torus", None)
    if terms is None or not terms.active:
        output = ring_attention(query, key, value, shards, scale=scale)
    else:
        platters = toroidal_ring_attention(
            query, key, value, terms(query), terms.settings, shards, scale=scale
        )
        output = terms.fuse(platters).flatten(3)
    return output.transpose(1, 2).contiguous()


def check_no_dropout(dropout: float) -> None:
    """Raises ValueError if attention weights are to be dropped."""
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, and over a sharded sequence there is none: set the "
            "configuration's attention dropout to 0 before the model is built, or evaluate"
        )


def check_no_padding(present_BN: Tensor | None) -> None:
    """Raises ValueError if there are tokens that nobody may attend to."""
    if present_BN is not None and not bool(present_BN.all()):
        raise ValueError("a sharded sequence has no padding: pack or cut it to full length")


def check_mask(
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **_: Any,
) -> None:
    """Raises ValueError if a decoder asks for another mask than the plain causal one."""
    check_no_padding(attention_mask)
    if local_size is not None:
        raise ValueError(
            f"the model has layers that see {local_size} tokens only, and a sharded sequence knows no such "
            "window: take a model without sliding_window, or set a window of the torus"
        )
    if use_vmap or allow_is_bidirectional_skip:
        raise ValueError("the model has a mask of its own, and a sharded sequence is plainly causal")


def _prepare(model: nn.Module, shards: SequenceShards) -> Any:
    """Checks the decoder, and has its inputs looked at and completed whenever it is called."""
    from .architecture import check_architecture
    from .decoders import IMPLEMENTATION

    inner: Any = getattr(model, "module", model)
    config = getattr(inner, "config", None)
    if getattr(config, "_attn_implementation", None) != IMPLEMENTATION:
        raise ValueError(
            f"{type(inner).__name__} does not attend over ranks: convert it by aiether.retrofit, or call "
            f'model.set_attn_implementation("{IMPLEMENTATION}"); leave `model` out for ToroidalAttention'
        )
    check_architecture(inner)
    scaled = str(getattr(config, "rope_parameters", None))
    if "'dynamic'" in scaled or "'longrope'" in scaled:
        raise ValueError(
            "the model's rotary frequencies depend on the length that it sees (rope_type 'dynamic' or "
            "'longrope'), and each rank sees another: choose 'yarn', 'linear' or 'default'"
        )

    def complete(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        shards.check_share(given.shape[1])
        positions = shards.positions(given.device)[None]
        own = kwargs.setdefault("position_ids", positions)
        if own.shape[-1] != shards.size or not bool((own == positions).all()):
            raise ValueError(
                "position_ids are not those of this rank's shard: leave them out, or take "
                "SequenceShards.positions"
            )
        if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
            raise ValueError(
                "labels would be shifted within a shard, and its last token's lost: pass "
                "**shards.targets(labels) of the whole sequence's labels"
            )
        return args, {**kwargs, "use_cache": False}

    return model.register_forward_pre_hook(complete, with_kwargs=True)
