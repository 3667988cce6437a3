from __future__ import annotations

import dataclasses

import pytest

from aiether.growth import FAMILIES, Family, block_tensors, family_of


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_registered_family_names_its_models_blocks(make_model, model_type: str) -> None:
    model = make_model(model_type, 2)
    family = family_of(model)
    assert family is family_of(model.config) is family_of(model.config.to_dict()) is family_of(model_type)
    assert family.depth(model.config.to_dict()) == 2
    blocks = block_tensors(model.state_dict(), family)
    assert list(blocks) == [0, 1]
    assert set(blocks[0]) == set(blocks[1])
    assert len(model.get_submodule(family.blocks)) == 2
    assert {name for block in blocks.values() for name in block.values()} == {
        name for name in model.state_dict() if name.startswith(f"{family.blocks}.")
    }
    for layer, block in blocks.items():
        for suffix, name in block.items():
            assert family.split(name) == (layer, suffix)
            assert family.name(layer, suffix) == name
    outputs = {suffix.rpartition(".")[0] for suffix in blocks[0] if family.is_output_projection(suffix)}
    assert outputs == set(family.output_projections)


def test_names_outside_the_blocks_have_no_layer() -> None:
    family = family_of("llama")
    for name in ("model.embed_tokens.weight", "model.layers.x.weight", "xmodel.layers.0.a", "model.layers.0"):
        assert family.split(name) is None


def test_layers_are_grouped_in_numerical_order() -> None:
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (10, 2, 0)]
    assert list(block_tensors(names, family_of("llama"))) == [0, 2, 10]


@pytest.mark.parametrize("source", ["t5", {"model_type": "t5"}, {}, object()])
def test_an_unknown_family_is_refused_with_how_to_register_it(source: object) -> None:
    with pytest.raises(ValueError, match=r"known: gpt2, llama.*FAMILIES\[model_type\] = "):
        family_of(source)


def test_one_registry_entry_makes_a_family_known(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Family(
        model_type="own", blocks="decoder.blocks", output_projections=("mix.out",), depth_key="depth"
    )
    monkeypatch.setitem(FAMILIES, "own", own)
    assert family_of({"model_type": "own"}).split("decoder.blocks.7.mix.out.weight") == (7, "mix.out.weight")
    assert own.depth({"depth": 4}) == 4
    with pytest.raises(ValueError, match="lacks 'depth'"):
        own.depth({"n_layer": 4})
    assert dataclasses.replace(own, blocks="h").name(0, "a.weight") == "h.0.a.weight"
