"""What makes plain attention toroidal, as parameters: gates, distance, scores between platters, fusion."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .settings import ToroidalSettings


@dataclass(frozen=True)
class Terms:
    """The terms at the present progress.

    Attributes
    ----------
    gate: float32 scalar, g.
    lambda_BHN: float32 (B or 1, H, N or 1), what a distance of 1 takes from the logits of a query.
    cross_H: float32, added to scores between different platters; -inf at progress 0.
    """

    gate: Tensor
    lambda_BHN: Tensor
    cross_H: Tensor


class TorusTerms(nn.Module):
    """Learned terms of one attention layer.

    At progress 0 they leave attention as it was, at 1 they are what `settings` asks for, moved by what was
    learned within its bounds. Progress is set from outside (`set_progress`).
    """

    progress: Tensor

    def __init__(self, num_heads: int, head_dim: int, settings: ToroidalSettings) -> None:
        super().__init__()
        settings.check_head(head_dim)
        self.settings, self.num_heads, self.head_dim = settings, num_heads, head_dim
        self.active = False  # progress > 0, known without asking a device
        self.register_buffer("progress", torch.zeros(()))
        platters, rank, size = settings.platters, settings.fusion_rank, head_dim // settings.platters
        self.lambda_shift = nn.Parameter(torch.empty(num_heads))
        self.lambda_token = nn.Parameter(torch.empty(num_heads, head_dim)) if settings.token_lambda else None
        self.cross_shift = self.fusion_left = self.fusion_right = self.fusion_scale = None
        if platters > 1:
            self.cross_shift = nn.Parameter(torch.empty(num_heads))
            if settings.fusion_mode == "low_rank":
                self.fusion_left = nn.Parameter(torch.empty(num_heads, platters, rank))
                self.fusion_right = nn.Parameter(torch.empty(num_heads, platters, rank))
            elif settings.fusion_mode == "attention":
                self.fusion_left = nn.Parameter(torch.empty(num_heads, size, rank))
                self.fusion_right = nn.Parameter(torch.empty(num_heads, size, rank))
                self.fusion_scale = nn.Parameter(torch.empty(num_heads))
        self.register_load_state_dict_post_hook(TorusTerms._read_progress)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Everything at its target, and no fusion yet: one factor is drawn, the other is 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        if self.fusion_left is not None:
            nn.init.normal_(self.fusion_left)
        if self.settings.fusion_mode == "attention" and self.fusion_right is not None:
            nn.init.normal_(self.fusion_right)

    def set_progress(self, progress: float) -> None:
        """From 0, plain attention, to 1.

        Raises
        ------
        ValueError
            For a number outside of 0 to 1.
        """
        if not isinstance(progress, Real) or not 0 <= progress <= 1:
            raise ValueError(f"progress is {progress}: from 0 (plain attention) to 1 (the targets) is meant")
        self.active = progress > 0
        self.progress.fill_(progress)

    def _read_progress(self, *loaded: Any) -> None:
        self.active = bool(self.progress > 0)

    def forward(self, query_BHNX: Tensor) -> Terms:
        """The terms for queries; `lambda_BHN` of each of them where lambda depends on the token."""
        shift = self.lambda_shift.float()[None, :, None]
        if self.lambda_token is not None:
            along_BHN = torch.einsum("bhnx,hx->bhn", query_BHNX, self.lambda_token.to(query_BHNX.dtype))
            shift = shift + along_BHN.float() / _length(query_BHNX)
        return Terms(
            gate=self.progress * self.settings.gate,
            lambda_BHN=self.strength(shift),
            cross_H=self.cross() + self.progress.log(),
        )

    def strength(self, shift: Tensor) -> Tensor:
        """Lambda of the given shifts, float32 of their shape, in its bounds and at the present progress."""
        factor = torch.exp(math.log(self.settings.lambda_range) * torch.tanh(shift.float()))
        return self.progress * self.settings.lambda_distance * factor

    def token_bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest lambda that any token can have in each head, float32 (H,) each."""
        shift = self.lambda_shift.float()
        reach = (
            torch.zeros_like(shift) if self.lambda_token is None else self.lambda_token.float().norm(dim=-1)
        )
        return self.strength(shift - reach), self.strength(shift + reach)

    def cross(self) -> Tensor:
        """Beta of each head at progress 1, float32 (H,), within its bounds."""
        target = self.lambda_shift.new_full((self.num_heads,), self.settings.cross, dtype=torch.float32)
        if self.cross_shift is None:
            return target
        return target + self.settings.cross_range * torch.tanh(self.cross_shift.float())

    def fuse(self, platters_BHNDY: Tensor) -> Tensor:
        """Mix a token's platters, (B, H, N, D, head_dim / D): Omega = I at progress 0.

        `low_rank`: Omega = I + U V^T / sqrt(r). `attention`: Omega = I + s (A - 1/D), with A the softmax over
        platters of the products of a token's own platters. `mean`: every platter becomes their mean.
        """
        mode, platters = self.settings.fusion_mode, self.settings.platters
        if platters == 1:
            return platters_BHNDY
        progress = self.progress.to(platters_BHNDY.dtype)
        if mode == "mean":
            return torch.lerp(platters_BHNDY, platters_BHNDY.mean(3, keepdim=True), progress)
        assert self.fusion_left is not None
        assert self.fusion_right is not None
        scale = self.settings.fusion_rank**-0.5
        left, right = (each.to(platters_BHNDY.dtype) for each in (self.fusion_left, self.fusion_right))
        if mode == "low_rank":
            fused = platters_BHNDY
            for each in range(self.settings.fusion_rank):
                asked_BHN1Y = (platters_BHNDY * right[:, None, :, each, None]).sum(3, keepdim=True)
                fused = torch.addcmul(fused, (progress * scale * left)[:, None, :, each, None], asked_BHN1Y)
            return fused
        assert self.fusion_scale is not None
        asked = torch.einsum("bhnky,hyr->bhnkr", platters_BHNDY, left)
        told = torch.einsum("bhnly,hyr->bhnlr", platters_BHNDY, right)
        mixed = torch.softmax((asked @ told.mT).float() * scale, dim=-1).to(asked.dtype) - 1 / platters
        strength = progress * self.fusion_scale.to(asked.dtype)[None, :, None, None, None]
        return platters_BHNDY + strength * (mixed @ platters_BHNDY)


def _length(query_BHNX: Tensor) -> Tensor:
    """Of each query, float32 (B, H, N); infinite for one of zeros, which then moves nothing."""
    exact = torch.promote_types(query_BHNX.dtype, torch.float32)
    length_BHN = torch.linalg.vector_norm(query_BHNX, dim=-1, dtype=exact).float()
    return length_BHN.masked_fill(length_BHN <= 1e-12, math.inf)
