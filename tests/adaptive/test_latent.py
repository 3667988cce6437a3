from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.adaptive.models import lahr, left_padded, tokens
from torch import Tensor

from aiether.adaptive import LahrForCausalLM, LatentSettings, commit_routing, set_halt_q
from aiether.adaptive.latent import LatentReasoning, _Run


def _iterations(model: LahrForCausalLM, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model.model(input_ids=input_ids, use_cache=False).iterations
    assert found is not None
    return found


def test_fewer_iterations_as_the_threshold_falls_from_all_to_one() -> None:
    model, input_ids = lahr("latent_only", iterations=4), tokens(4, 30)
    means = []
    for q in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0):
        set_halt_q(model, q)
        means.append(_iterations(model, input_ids).float().mean().item())
    assert means[0] == 4
    assert means[-1] == 1
    assert means == sorted(means, reverse=True)
    assert len(set(means)) > 3


def test_a_threshold_of_one_thinks_to_the_end_where_a_probability_rounds_to_one() -> None:
    model = lahr("latent_only", halt_q=1.0)
    with torch.no_grad():
        model.model.latent.halt_bias.fill_(200.0)
    assert (_iterations(model, tokens()) == 3).all()


def test_a_step_of_an_optimizer_turns_no_decision() -> None:
    """At width 512 and a rate of 0.002, from an even prior: by at most 0.002 sqrt(512) = 0.045 logits."""
    latent = LatentReasoning(torch.nn.Identity(), 512, LatentSettings(iterations=2))
    states_BTD = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([latent.halt_weight], lr=0.002, weight_decay=0)
    before_BT = latent.stop_logit(0, states_BTD).detach()
    latent.stop_logit(0, states_BTD).square().add(latent.stop_logit(0, states_BTD)).sum().backward()
    optimizer.step()
    moved_BT = (latent.stop_logit(0, states_BTD) - before_BT).abs()
    assert moved_BT.max() > 0
    assert moved_BT.max() <= 0.002 * 512**0.5 * 1.001


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_training_pass_with_the_same_exits_computes_the_same(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, input_ids = lahr("latent_only", iterations=4, halt_q=0.6), tokens()
    model.set_attn_implementation(attention)
    taken = _iterations(model, input_ids)
    assert len(taken.unique()) > 1
    halted = model(input_ids=input_ids, use_cache=False).logits

    def forced(run: _Run, number: int, logit_BT: Tensor, stop_p_BT: Tensor, prior: float) -> Tensor:
        return taken == number + 1

    monkeypatch.setattr(_Run, "_sampled", forced)
    monkeypatch.setattr(LatentSettings, "training_rows", lambda settings, batch: [batch] * 4)
    trained = model.train().model(input_ids=input_ids, use_cache=False)
    assert torch.equal(trained.iterations, taken)
    assert torch.allclose(model.lm_head(trained.last_hidden_state), halted, atol=1e-5)


def _by_hand(model: Any, hidden_TD: Tensor, taken_T: Tensor) -> Tensor:
    """The latent block for one row, by definition: a stopped token keeps the keys of its last iteration."""
    latent, block = model.model.latent, model.model.latent.block
    attention, length = block.self_attn, len(hidden_TD)
    cos, sin = model.model.rotary_emb(hidden_TD[None], position_ids=torch.arange(length)[None])
    state, keys, values = hidden_TD.clone(), {}, {}

    def turned(x: Tensor, t: int) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos[0, t] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[0, t]

    for number in range(latent.settings.iterations):
        read = state + latent.inject * hidden_TD + latent.steps[number]
        normed, proposed = block.input_layernorm(read), state.clone()
        for t in range(length):
            if taken_T[t] > number:  # still thinking: new keys
                keys[t] = turned(attention.k_proj(normed[t]).view(2, 8), t)
                values[t] = attention.v_proj(normed[t]).view(2, 8)
        for t in range(length):
            if taken_T[t] <= number:
                continue
            query = turned(attention.q_proj(normed[t]).view(2, 8), t)
            seen = (
                torch.stack([keys[s] for s in range(t + 1)]),
                torch.stack([values[s] for s in range(t + 1)]),
            )
            weights = (torch.einsum("hd,shd->hs", query, seen[0]) / 8**0.5).softmax(-1)
            attended = attention.o_proj(torch.einsum("hs,shd->hd", weights, seen[1]).flatten())
            after = read[t] + attended
            proposed[t] = after + block.mlp(block.post_attention_layernorm(after))
        state = proposed
    return state


def test_stopped_tokens_are_seen_as_they_last_were() -> None:
    model, input_ids = lahr("latent_only", iterations=4, halt_q=0.6), tokens(1, 9)
    inner = model.model
    taken = _iterations(model, input_ids)[0]
    assert len(taken.unique()) > 1
    before: list[Tensor] = []
    inner.latent.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        found = inner(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        expected = inner.norm(_by_hand(model, before[0][0], taken))
    assert torch.allclose(found, expected, atol=1e-5)


def test_later_tokens_find_the_keys_of_a_prompt_that_stopped_early() -> None:
    model, input_ids = lahr("latent_only", iterations=4), tokens(2, 12)
    thoughtful = torch.arange(12) >= 8

    latent: LatentReasoning = model.model.latent
    places: list[Tensor] = []
    latent.register_forward_pre_hook(
        lambda _, __, kwargs: places.append(kwargs["places_BT"]), with_kwargs=True
    )
    # Tokens of the prompt stop at once, those behind it never: deeper iterations were not run for the prompt.
    latent.stop_logit = lambda number, state: torch.where(thoughtful[places[-1]], -99.0, 99.0).expand(2, -1)  # type: ignore[method-assign]
    with torch.no_grad():
        full = model(input_ids=input_ids, use_cache=False).logits
        first = model(input_ids=input_ids[:, :8], use_cache=True)
        cache = first.past_key_values
        steps = [model(input_ids=input_ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
    assert torch.allclose(torch.cat([first.logits, *steps], 1), full, atol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers[-1].iterations] == [12] * 4


@pytest.mark.parametrize("halting", ["fixed", "random", "change"])
def test_controls(halting: str) -> None:
    model, input_ids = lahr("latent_only", halting=halting, iterations=3), tokens(4, 40)
    names = [name for name, _ in model.named_parameters()]
    assert not any("halt_" in name for name in names), "nothing to learn"
    model.train()
    sampled = model.model(input_ids=input_ids)
    assert sampled.loss_weights is None
    taken = sampled.iterations.float()
    if halting == "fixed":
        assert (taken == 3).all()
        assert (_iterations(model.eval(), input_ids) == 3).all()
        return
    assert abs(taken.mean().item() - 2) < 0.2, "drawn from the uniform prior"
    again = model.model(input_ids=input_ids).iterations.float()
    assert not torch.equal(again, taken)
    found = _iterations(model.eval(), input_ids).float()
    if halting == "random":
        assert abs(found.mean().item() - 2) < 0.5
        assert torch.equal(found, _iterations(model, input_ids))
    else:
        latent = model.model.latent
        for threshold, expected in ((0.0, 3), (1e9, 1)):
            latent.settings = LatentSettings(halting="change", iterations=3, change_threshold=threshold)
            assert (_iterations(model, input_ids) == expected).all()


def test_draws_are_equal_for_equal_passes_and_for_a_copy() -> None:
    model, input_ids = lahr("latent_only").train(), tokens()
    other = copy.deepcopy(model)
    torch.manual_seed(5)
    first = model.model(input_ids=input_ids).iterations
    torch.manual_seed(6)
    assert torch.equal(other.model(input_ids=input_ids).iterations, first)
    commit_routing(other)
    with torch.no_grad():
        drawn = other.model(input_ids=input_ids).iterations
        assert torch.equal(other.model(input_ids=input_ids).iterations, drawn), "no gradient: no new pass"


def test_iterations_are_counted_without_padding() -> None:
    model = lahr("latent_only", iterations=4, halt_q=0.6)
    input_ids, mask = left_padded(tokens(2, 12), [0, 7])
    model.reset_compute_figures()
    taken = model.model(input_ids=input_ids, attention_mask=mask, use_cache=False).iterations
    counted = model.compute_figures()["iterations"]
    assert counted == pytest.approx(taken[mask.bool()].float().mean().item())


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"halting": "never"},
        {"halt_q": 1.5},
        {"kl_weight": -1.0},
        {"prior": "normal"},
        {"prior_rate": 0.0},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, float | str]) -> None:
    name = next(iter(wrong)).replace("prior_rate", "rate")
    with pytest.raises(ValueError, match=name):
        LatentSettings(**wrong)  # type: ignore[arg-type]
