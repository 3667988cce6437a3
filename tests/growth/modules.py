"""Modules that no library knows: what a user's own model may look like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 8


class PreNorm(nn.Module):
    """x + mix(norm(x)), then x + out(relu(norm(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.mix(self.norm(hidden))
        return hidden + self.out(torch.relu(self.up(self.norm(hidden))))


class Encoder(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm() for _ in range(depth)])

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Classifier(nn.Module):
    """Without a configuration: only the list says how deep it is."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.encoder = Encoder(depth)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head(self.encoder(hidden))
