"""Blocks written by hand, with every way a branch may be silenced; the claim is checked by running them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.growth.modules import WIDTH
from torch import Tensor, nn
from torch.nn import functional as F

from aiether.growth import family_of


def linear(*, bias: bool = False, to: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, to, bias=bias)


class Block(nn.Module):
    """A block from its tensors and its equation."""

    def __init__(self, equation: Callable[[Any, Tensor], Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.equation = equation
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.equation(self, hidden)


def rms(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)


def attention(b: Any, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], b.value(x)[:, None])[:, 0]


def experts(b: Any, x: Tensor) -> Tensor:
    scores = torch.softmax(x @ b.router.T, dim=-1)  # (batch, length, 2)
    hidden = torch.einsum("bth,eih->beti", x, b.up)
    return (torch.einsum("beti,ehi->bthe", F.silu(hidden), b.down) * scores[:, :, None]).sum(-1)


def written_in_place(b: Any, x: Tensor) -> Tensor:
    branch = b.out(x)
    branch += b.scale * x.tanh()
    return x + branch


def written_through_a_view(b: Any, x: Tensor) -> Tensor:
    stream = x.clone()
    stream[..., :4] += 1
    return stream + b.out(x)


def two_streams(b: Any, x: Tensor) -> Tensor:
    return x + x + b.out(x)


def vector(size: int = WIDTH) -> Tensor:
    return torch.randn(size)


SILENCED = {
    "linear": (Block(lambda b, x: x + b.out(x), out=linear(bias=True)), {"out.weight": 0, "out.bias": 0}),
    "behind an activation": (Block(lambda b, x: x + F.gelu(b.out(x)), out=linear()), {"out.weight": 0}),
    "attention": (
        Block(lambda b, x: x + b.out(attention(b, x)), value=linear(), out=linear()),
        {"out.weight": 0},
    ),
    "attention without a projection": (
        Block(lambda b, x: x + attention(b, x) * b.gain, value=linear(), gain=vector()),
        {"gain": 0},
    ),
    "parallel": (
        Block(lambda b, x: b.first(x) + b.second(x) + x, first=linear(), second=linear()),
        {"first.weight": 0, "second.weight": 0},
    ),
    "gated": (
        Block(lambda b, x: x + b.out(F.silu(b.gate(x)) * b.up(x)), gate=linear(), up=linear(), out=linear()),
        {"out.weight": 0},
    ),
    "layer scale": (Block(lambda b, x: x + b.scale * b.out(x), out=linear(), scale=vector()), {"scale": 0}),
    "post-norm": (
        Block(lambda b, x: x + b.norm(b.out(x)), out=linear(), norm=nn.LayerNorm(WIDTH)),
        {"norm.weight": 0, "norm.bias": 0},
    ),
    "post-norm, 1 + w": (
        Block(lambda b, x: x + rms(b.out(x)) * (1.0 + b.scale.float()), out=linear(), scale=vector()),
        {"scale": -1},
    ),
    "post-norm without a scale": (
        Block(lambda b, x: x + F.layer_norm(b.out(x), (WIDTH,)), out=linear(bias=True)),
        {"out.weight": 0, "out.bias": 0},
    ),
    "scaled stream": (
        Block(lambda b, x: (x + b.out(x)) * b.scalar, out=linear(), scalar=vector(1)),
        {"out.weight": 0, "scalar": 1},
    ),
    "another shape": (
        Block(lambda b, x: (x.reshape(-1, WIDTH) + b.out(x.reshape(-1, WIDTH))).view(x.shape), out=linear()),
        {"out.weight": 0},
    ),
    "experts": (
        Block(
            lambda b, x: x + experts(b, x),
            router=torch.randn(2, WIDTH),
            up=torch.randn(2, 5, WIDTH),
            down=torch.randn(2, WIDTH, 5),
        ),
        {"down": 0},
    ),
    "convolution": (
        Block(lambda b, x: x + b.out(x.transpose(1, 2)).transpose(1, 2), out=nn.Conv1d(WIDTH, WIDTH, 1)),
        {"out.weight": 0, "out.bias": 0},
    ),
    "in place": (Block(written_in_place, out=linear(), scale=vector()), {"out.weight": 0, "scale": 0}),
    "torch's encoder layer": (
        nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=True),
        {
            "self_attn.out_proj.weight": 0,
            "self_attn.out_proj.bias": 0,
            "linear2.weight": 0,
            "linear2.bias": 0,
        },
    ),
}
REFUSED = {
    "torch's post-LN layer": (
        nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True),
        "native_layer_norm stands on the residual stream",
    ),
    "no stream": (Block(lambda b, x: b.out(x), out=linear()), "mm stands on"),
    "post-RMS": (Block(lambda b, x: rms(x + b.out(x)) * b.w, out=linear(), w=vector()), "no tensor silences"),
    "a branch without tensors": (
        Block(lambda b, x: x + x.tanh() + b.out(x), out=linear()),
        "no tensor silences",
    ),
    "a branch that is never zero": (
        Block(lambda b, x: x + torch.sigmoid(b.out(x)), out=linear()),
        "no tensor silences",
    ),
    "the stream twice": (Block(two_streams, out=linear()), "no tensor silences"),
    "the stream permuted": (Block(lambda b, x: x.flip(-1) + b.out(x), out=linear()), "flip stands on"),
    "the stream scaled": (Block(lambda b, x: 0.5 * x + b.out(x), out=linear()), "no tensor silences"),
    "the branch subtracted from": (Block(lambda b, x: b.out(x) - x, out=linear()), "sub stands on"),
    "written through a view": (Block(written_through_a_view, out=linear()), "no residual stream"),
}


def model_of(block: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


@pytest.mark.parametrize("name", SILENCED)
def test_the_nearest_tensors_that_silence_a_block_are_found_and_do(name: str) -> None:
    block, values = SILENCED[name]
    family = family_of(model_of(block))
    assert family.refusal is None
    assert dict(family.identity) == values
    block.eval()
    hidden = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert (block(hidden) - hidden).abs().max() > 1e-3
        for suffix, tensor in block.state_dict().items():
            if (value := family.identity_value(suffix)) is not None:
                tensor.fill_(value)
        torch.testing.assert_close(block(hidden), hidden, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_block_that_cannot_be_the_identity_says_what_stands_in_the_way(name: str) -> None:
    block, reason = REFUSED[name]
    family = family_of(model_of(block))
    assert family.refusal is not None
    assert reason in family.refusal
    assert family.identity == ()


def test_the_projections_behind_a_post_norm_and_its_offset_are_known() -> None:
    family = family_of(model_of(SILENCED["post-norm, 1 + w"][0]))
    assert family.output_projections == ("out",)
    assert family.unit_offset == ("scale",)
