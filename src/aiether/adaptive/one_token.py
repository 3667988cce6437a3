"""A routed layer while text is generated: one token of each row, by the rule of `Routing` for whole texts.

Usually only rows that want the layer run it. Deciding reads one number a row back from the device; where no
row wants the layer, nothing of it is launched. With a static cache all rows run it and nothing is read back:
the step can be compiled and replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cache import CompactLayer
from .ledger import Ledger, Turn
from .routing import Routing
from .static_cache import StaticCompactLayer


def is_one_token(
    routing: Routing, hidden_BTD: Tensor, cache: CompactLayer | StaticCompactLayer | None
) -> bool:
    """Whether the functions here do what the routing would: a token behind others, nothing to count."""
    if cache is None or not cache.is_initialized or not cache.started or hidden_BTD.shape[1] != 1:
        return False
    if routing.training or routing.counting or routing.chosen is not None:
        return False
    return isinstance(cache, StaticCompactLayer) or (
        not torch.is_grad_enabled() and not torch.compiler.is_compiling() and hidden_BTD.device.type != "meta"
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


def pass_all(
    routing: Routing,
    hidden_B1D: Tensor,
    present_B1: Tensor | None,
    cache: StaticCompactLayer,
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """(B, 1, D) -> (B, 1, D), nothing read back: every row runs, and where it should not, nothing is kept.

    Args:
        present_B1: bool, False for padding; None: no padding.
        run: the block, of all rows, with the columns of the cache that each may attend to, bool (B, 1, 1, C).
    """
    scores_B1 = routing.scores(hidden_B1D)
    wanted_B1 = routing.wanted(hidden_B1D, scores_B1, cache.present_B[:, None])
    if present_B1 is not None:
        wanted_B1 = wanted_B1 & present_B1
    bound_B = routing.settings.budget.at(cache.present_B)
    admitted_B = wanted_B1[:, 0] & (cache.used_B < bound_B)
    output_B1D = run(cache.take(admitted_B, present_B1)).to(hidden_B1D.dtype)
    if routing.settings.learned:
        gate_B11 = torch.sigmoid(scores_B1)[..., None].to(hidden_B1D.dtype)
        output_B1D = torch.lerp(hidden_B1D, output_B1D, gate_B11)
    return torch.where(admitted_B[:, None, None], output_B1D, hidden_B1D)


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
