"""A routed layer while text is generated: one token of each row, and only rows that want the layer run it.

The same rule as `Routing` applies to whole sequences. Deciding reads one number a row back from the device;
where no row wants the layer, nothing of it is launched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cache import CompactLayer
from .ledger import Ledger, Turn
from .routing import Routing


def is_one_token(routing: Routing, hidden_BTD: Tensor, cache: CompactLayer | None) -> bool:
    """Whether `pass_one` does what the routing would: a token behind others, nothing to learn or to count."""
    return (
        cache is not None
        and cache.is_initialized
        and cache.seen > 0
        and hidden_BTD.shape[1] == 1
        and not routing.training
        and not routing.counting
        and routing.chosen is None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and hidden_BTD.device.type != "meta"
    )


def pass_one(
    routing: Routing,
    hidden_B1D: Tensor,
    present_B1: Tensor | None,
    cache: CompactLayer,
    run: Callable[[Turn, Tensor], Tensor],
) -> Tensor:
    """(B, 1, D) -> (B, 1, D).

    Args:
        present_B1: bool, False for padding; None: no padding.
        run: the block, of A rows: (A, 1, D) -> (A, 1, D).
    """
    ledger, place = cache.ledger(routing.threshold if routing.settings.learned else None), cache.seen
    wanted_B, here_B, gates_B = _read(routing, hidden_B1D, present_B1, ledger)
    bound_B = routing.settings.budget.at(ledger.present_B)
    rows_A = ledger.enter(wanted_B, here_B, bound_B, place)
    cache.seen += 1
    if not len(rows_A):
        return hidden_B1D
    turn = cache.take(rows_A, hidden_B1D)
    chosen_A1D = turn.of_rows(hidden_B1D)
    output_A1D = run(turn, chosen_A1D)
    if gates_B is not None:
        gates = torch.from_numpy(gates_B[rows_A]).to(chosen_A1D.dtype)
        gates_A11 = gates[:, None, None].to(chosen_A1D.device, non_blocking=True)
        output_A1D = torch.lerp(chosen_A1D, output_A1D.to(chosen_A1D.dtype), gates_A11)
    if turn.rows_A is None:
        return output_A1D.to(hidden_B1D.dtype)
    return hidden_B1D.index_copy(0, turn.rows_A, output_A1D.to(hidden_B1D.dtype))


def _read(
    routing: Routing, hidden_B1D: Tensor, present_B1: Tensor | None, ledger: Ledger
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Of each row: whether the causal rule wants its token, whether it is no padding, and its gate."""
    if not routing.settings.learned:
        places_B1 = torch.from_numpy(ledger.present_B)[:, None]
        here_B = np.ones(len(places_B1), dtype=bool) if present_B1 is None else present_B1[:, 0].cpu().numpy()
        return routing.wanted_by_place(places_B1)[:, 0].numpy(), here_B, None
    scores_B1 = routing.scores(hidden_B1D)
    judged_B1 = routing.causal_scores(hidden_B1D, scores_B1)
    told = judged_B1 if present_B1 is None else torch.where(present_B1, judged_B1, float("nan"))
    if judged_B1 is not scores_B1:
        told = torch.cat([told, scores_B1], 1)
    told = told.cpu().numpy()
    here_B = ~np.isnan(told[:, 0])
    wanted_B = here_B if routing.settings.capacity == 1 else told[:, 0] > ledger.threshold
    return wanted_B, here_B, (1 + np.tanh(told[:, -1] / 2)) / 2
