"""A sequence that is sharded over the ranks of a process group: who holds which tokens, labels and sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class SequenceShards:
    """How the ranks share a sequence. Every rank of the group makes it alike.

    Attributes
    ----------
    length: tokens of the whole sequence.
    group: the process group whose R ranks share it; None: the default group, all ranks.
    zigzag: the sequence is cut into 2R chunks, and rank i holds chunks i and 2R - 1 - i, so that all ranks
        have equal work under a causal mask. Otherwise rank i holds the i-th of R, and under a causal mask the
        last one works longest.

    Raises
    ------
    ValueError
        If there is no process group, or the chunks would be of uneven sizes.
    """

    length: int
    group: Any = None
    zigzag: bool = True

    def __post_init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "there is no process group to share a sequence over: start the script by torchrun and call "
                "torch.distributed.init_process_group first"
            )
        if self.rank < 0:
            raise ValueError("this process is no member of the group: make SequenceShards on its ranks only")
        chunks = self.ranks * (2 if self.zigzag else 1)
        if self.length < 1 or self.length % chunks:
            below = self.length - self.length % chunks
            choice = f"{below} or {below + chunks}" if below > 0 else str(chunks)
            raise ValueError(
                f"a sequence of {self.length} tokens does not make {chunks} chunks of one size for "
                f"{self.ranks} ranks{' in zigzag order' if self.zigzag else ''}: cut or pack it to {choice}"
            )

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """This process's rank within the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Tokens of one rank, N / R."""
        return self.length // self.ranks

    def positions(self, device: torch.device | str = "cpu", rank: int | None = None) -> Tensor:
        """Where a rank's tokens stand in the whole sequence, int64 (N / R,); None: this rank's."""
        rank = self.rank if rank is None else rank
        if not self.zigzag:
            return torch.arange(rank * self.size, (rank + 1) * self.size, device=device)
        chunk, last = self.size // 2, 2 * self.ranks - 1 - rank
        return torch.cat(
            [torch.arange(i * chunk, (i + 1) * chunk, device=device) for i in (rank, last)],
        )

    def check_share(self, tokens: int) -> None:
        """Raises ValueError if so many tokens are not a rank's share."""
        if tokens != self.size:
            raise ValueError(
                f"there are {tokens} tokens here, and each of {self.ranks} ranks has {self.size} of "
                f"{self.length}: give each rank its share (SequenceShards.take), and no cached keys"
            )

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor that every rank has whole.

        Raises
        ------
        ValueError
            If `dim` is not of the sequence's length.
        """
        if whole.shape[dim] != self.length:
            raise ValueError(
                f"dimension {dim} is {whole.shape[dim]}, and the sequence has {self.length} tokens: give the "
                "whole sequence, and the dimension that its tokens lie along"
            )
        return whole.index_select(dim, self.positions(whole.device))

    @torch.no_grad()
    def gather(self, part: Tensor, dim: int = 1) -> Tensor:
        """The whole from every rank's part, on every rank, in order and without gradient."""
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        order = torch.cat([self.positions(part.device, rank) for rank in range(self.ranks)])
        return torch.cat(parts, dim).index_select(dim, order.argsort())

    def targets(self, labels: Tensor, ignore_index: int = -100) -> dict[str, Any]:
        """What a decoder of transformers takes for its loss, `model(ids, **shards.targets(labels))`.

        Labels are shifted before they are shared, so that a shard's last token has the next shard's first as
        its label. A rank's loss is its tokens' sum by the number of labels in the whole batch: the ranks'
        losses add up to the loss of the whole sequence (`total`), and so do their gradients
        (`sum_gradients`).

        Args:
            labels: int64 (B, N), not shifted, whole.
        """
        nothing = labels.new_full((*labels.shape[:-1], 1), ignore_index)
        shifted = torch.cat([labels[..., 1:], nothing], dim=-1)
        own = self.take(shifted, dim=-1)
        count = (shifted != ignore_index).sum()
        return {"labels": own, "shift_labels": own, "num_items_in_batch": count}

    @torch.no_grad()
    def total(self, value: Tensor) -> Tensor:
        """The sum of the ranks' values, on every rank, without gradient."""
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Give every rank the sum of the ranks' gradients, in place: after `backward`, before the step.

        Every rank has the same parameters with gradients.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.group)
