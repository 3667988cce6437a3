from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from aiether.growth import family_of, initialise_output_projections


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("depth", [1, 3])
def test_output_projections_start_at_the_scale_of_the_final_depth(
    make_model, model_type: str, depth: int
) -> None:
    sizes = {"n_embd": 96} if model_type == "gpt2" else {"hidden_size": 96, "intermediate_size": 128}
    model, family = make_model(model_type, depth, initializer_range=0.05, **sizes), family_of(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialise_output_projections(model, family, 12, lambda _: torch.Generator().manual_seed(4))
    drawn = 0
    for name, tensor in model.state_dict().items():
        parts = family.split(name)
        if parts and tensor.ndim == 2 and family.is_output_projection(parts[1]):
            assert float(tensor.std()) == pytest.approx(0.05 / math.sqrt(24), rel=0.06)
            drawn += 1
        else:
            assert torch.equal(tensor, before[name]), name
    assert drawn == 2 * depth


def test_the_same_generator_gives_the_same_weights_and_grown_and_static_arms_share_the_lower_layers(
    make_model,
) -> None:
    family, states = family_of("gpt2"), []
    for depth in (2, 2, 4):
        model = make_model("gpt2", depth)
        generator = torch.Generator().manual_seed(1)
        initialise_output_projections(model, family, 4, partial(_always, generator))
        states.append(model.state_dict()["transformer.h.1.mlp.c_proj.weight"])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def _always(generator: torch.Generator, name: str) -> torch.Generator:
    return generator


def test_a_model_of_another_family_is_refused(make_model) -> None:
    with pytest.raises(ValueError, match="no output projection of family 'gpt2'"):
        initialise_output_projections(make_model("llama", 1), family_of("gpt2"), 4)
    with pytest.raises(AttributeError):
        initialise_output_projections(nn.Linear(2, 2), family_of("gpt2"), 4)
