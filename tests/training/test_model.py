"""What a fresh model begins with."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from transformers import PreTrainedModel

from aiether.training.model import build_model

Arch = Literal["gpt2", "llama", "phi"]
PHI_OUT = ("self_attn.dense.weight", "mlp.fc2.weight")
ARCHES: tuple[Arch, ...] = ("gpt2", "llama", "phi")


def fresh(
    arch: Arch, n_layer: int, *, seed: int = 3, vocab_size: int = 64, n_embd: int = 64
) -> PreTrainedModel:
    return build_model(
        arch,
        n_layer=n_layer,
        n_head=2,
        n_embd=n_embd,
        context_length=16,
        vocab_size=vocab_size,
        dropout=0.0,
        eos_token_id=0,
        final_depth=12,
        seed=seed,
    )


@pytest.mark.parametrize("arch", ARCHES)
def test_arms_of_one_seed_share_every_tensor_that_both_have(arch: Arch) -> None:
    small, large = fresh(arch, 1).state_dict(), fresh(arch, 3).state_dict()
    assert small.keys() < large.keys()
    assert [name for name, tensor in small.items() if not torch.equal(tensor, large[name])] == []


@pytest.mark.parametrize("arch", ARCHES)
def test_no_two_matrices_and_no_two_seeds_begin_alike(arch: Arch) -> None:
    first, second = (dict(fresh(arch, 2, seed=seed).named_parameters()) for seed in (0, 1))
    matrices = [tensor for model in (first, second) for tensor in model.values() if tensor.ndim > 1]
    starts = {tuple(matrix.flatten()[:8].tolist()) for matrix in matrices}
    assert len(starts) == len(matrices)


@pytest.mark.parametrize("arch", ARCHES)
def test_matrices_are_drawn_at_the_scale_of_the_configuration(arch: Arch) -> None:
    model = fresh(arch, 2, vocab_size=512, n_embd=128)
    for name, tensor in model.named_parameters():
        if tensor.ndim < 2:
            assert tensor.unique().tolist() in ([0.0], [1.0]), name
            continue
        output = name.endswith(("c_proj.weight", "o_proj.weight", "down_proj.weight", *PHI_OUT))
        expected = 0.02 / 24**0.5 if output else 0.02
        assert tensor.std().item() == pytest.approx(expected, rel=0.06), name


def test_a_model_leaves_the_caller_s_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    fresh("gpt2", 1)
    assert torch.equal(torch.rand(3), expected)


def test_phi_turns_half_of_each_head_and_has_its_biases() -> None:
    model: Any = fresh("phi", 2)
    assert model.model.layers[0].self_attn.rotary_ndims == 16
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert model.lm_head.weight is model.model.embed_tokens.weight
