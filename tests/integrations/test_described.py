"""What growth and resuming would lose is refused before the first step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, Wav2Vec2Config, Wav2Vec2ForCTC

from aiether import GrowthConfig, fit
from aiether.growth import family_of
from aiether.integrations._checkpoint import Checkpoint
from aiether.integrations._described import check_described, check_nothing_attached
from aiether.integrations._resume import load_model

from .tiny import CONTEXT, VOCAB, blocks, tiny_model, tiny_trainer


def growth(**settings: Any) -> GrowthConfig:
    plain: dict[str, Any] = {
        "trigger": "fixed",
        "growth_fractions": (0.5,),
        "placement": "stack",
        "grow_by": "double",
        "init": "copy",
        "protocol": "none",
        "warmup_steps": 0,
    }
    return GrowthConfig(**{**plain, **settings})


def wrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Every down projection in a container, as adapters are put in: the names are others."""
    for block in blocks(model):
        mlp: Any = block.mlp
        mlp.down_proj = nn.Sequential(mlp.down_proj)
    return model


def checkpoint_of(model: PreTrainedModel, folder: Path) -> Checkpoint:
    model.save_pretrained(folder)
    return Checkpoint(folder, step=4, stage=0)


# -- loading a checkpoint ------------------------------------------------------------------------------------


def test_a_checkpoint_that_lacks_tensors_is_not_filled_with_random_ones(tmp_path: Path) -> None:
    naive: Any = LlamaForCausalLM.from_pretrained(checkpoint_of(wrapped(tiny_model("llama")), tmp_path).path)
    assert naive.model.layers[0].mlp.down_proj.weight.std() > 0, "drawn anew, with a warning only"
    with pytest.raises(ValueError, match=r"lacks 2 tensors.*layers\.0\.mlp\.down_proj\.weight.*Start anew"):
        load_model(tiny_model("llama"), Checkpoint(tmp_path, step=4, stage=0))


def test_a_checkpoint_with_tensors_too_many_is_not_cut(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.register_parameter("gate", nn.Parameter(torch.ones(3)))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"also holds 1 tensors.*model\.gate"):
        load_model(tiny_model("llama"), checkpoint_of(model, tmp_path))


def test_a_checkpoint_of_another_class_is_refused(tmp_path: Path) -> None:
    backbone = tiny_model("llama").base_model
    assert isinstance(backbone, PreTrainedModel)
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM, the Trainer a LlamaModel"):
        load_model(backbone, checkpoint_of(tiny_model("llama"), tmp_path))


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_whole_checkpoint_loads_with_its_ties(tmp_path: Path, arch: str) -> None:
    model = tiny_model(arch)
    loaded = load_model(model, checkpoint_of(model, tmp_path))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight  # type: ignore[union-attr]
    assert tied == (arch == "gpt2")


# -- a model that its configuration does not describe -------------------------------------------------------


def untied(model: PreTrainedModel) -> PreTrainedModel:
    head: Any = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def other_activation(model: PreTrainedModel) -> PreTrainedModel:
    mlp: Any = blocks(model)[0].mlp
    mlp.act_fn = nn.ReLU()
    return model


def wider(model: PreTrainedModel) -> PreTrainedModel:
    mlp: Any = blocks(model)[1].mlp
    mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 16))
    return model


@pytest.mark.parametrize(
    ("arch", "change", "says"),
    [
        ("llama", wrapped, r"mlp\.down_proj' is Sequential, and Linear"),
        ("llama", other_activation, r"mlp\.act_fn' is ReLU"),
        ("llama", wider, r"layers\.1\.mlp\.up_proj\.weight' is \(64, 16\), and \(32, 16\)"),
        ("gpt2", untied, r"two tensors here, and one.*tie_word_embeddings"),
    ],
)
def test_a_model_that_its_configuration_does_not_describe_is_refused(
    tmp_path: Path, arch: str, change: Callable[[PreTrainedModel], PreTrainedModel], says: str
) -> None:
    trainer = tiny_trainer(tmp_path, change(tiny_model(arch)))
    with pytest.raises(ValueError, match=says):
        fit(trainer, growth(trigger="never"))
    assert trainer.state.global_step == 0
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
def test_what_the_configuration_describes_passes(arch: str) -> None:
    model = tiny_model(arch)
    model.resize_token_embeddings(40)
    check_described(model.bfloat16())


def test_modules_that_are_parametrised_by_their_class_pass() -> None:
    def parametrised() -> PreTrainedModel:
        return Wav2Vec2ForCTC(
            Wav2Vec2Config(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                conv_dim=(8,),
                conv_stride=(2,),
                conv_kernel=(3,),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
        )

    check_described(parametrised())
    model: Any = parametrised()
    weight_norm(model.lm_head)
    with pytest.raises(ValueError, match=r"lm_head\.parametrizations"):
        check_described(model)


# -- what was attached ---------------------------------------------------------------------------------------


def seen(*_: Any) -> None:
    """A hook of the user's."""


def doubled(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *inputs: 2 * forward(*inputs)


ATTACHED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m.model.layers[0].register_forward_hook(seen), r"layers\.0' has a forward hook"),
    (lambda m: m.register_forward_pre_hook(functools.partial(seen)), "the model has a forward pre-hook"),
    (lambda m: m.model.layers[1].mlp.register_full_backward_hook(seen), "backward hook"),
    (lambda m: m.lm_head.weight.register_hook(seen), "gradient hook on its 'weight'"),
    (lambda m: m.lm_head.weight.register_post_accumulate_grad_hook(seen), "gradient hook"),
    (lambda m: doubled(m.model.layers[1].mlp), r"layers\.1\.mlp' has a forward put"),
    (lambda m: m.compile(backend="eager"), r"the model is compiled.*compile=True"),
    (lambda m: m.model.layers[1].compile(backend="eager"), r"layers\.1' is compiled.*compile=True"),
    (lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")), r"compiled.*compile=True"),
]


@pytest.mark.parametrize(("attach", "says"), ATTACHED)
def test_what_a_growth_would_leave_behind_is_refused(
    tmp_path: Path, attach: Callable[[Any], Any], says: str
) -> None:
    model = tiny_model("llama")
    attach(model)
    trainer = tiny_trainer(tmp_path, model)
    with pytest.raises(ValueError, match=says):
        fit(trainer, growth(trigger="never"))
    assert trainer.state.global_step == 0


def test_a_model_compiled_by_the_wrapper_is_refused(tmp_path: Path) -> None:
    model: Any = torch.compile(tiny_model("llama"), backend="eager")
    plain = tiny_trainer(tmp_path, eval_strategy="no")
    with pytest.raises(ValueError, match="compile=True"):
        fit(Trainer(model, plain.args, train_dataset=plain.train_dataset), growth(trigger="never"))


def test_what_the_libraries_attach_is_not_the_users(tmp_path: Path) -> None:
    """transformers' hooks that capture outputs, accelerate's mixed precision, our own compiled blocks."""
    model = tiny_model("llama")
    model(torch.randint(VOCAB, (2, CONTEXT)), output_hidden_states=True)
    trainer = tiny_trainer(tmp_path, model, bf16=True)
    trainer.evaluate()
    assert any(module._forward_hooks for module in model.modules()), "transformers captures without hooks"
    assert "forward" in vars(model), "accelerate no longer replaces the forward"
    model.enable_input_require_grads()
    family = family_of(model)
    check_nothing_attached(model, family, compiled=False)
    for block in blocks(model):
        block.compile(backend="eager")
    check_nothing_attached(model, family, compiled=True)
    with pytest.raises(ValueError, match="is compiled"):
        check_nothing_attached(model, family, compiled=False)


def test_mixed_precision_does_not_hide_a_patched_forward(tmp_path: Path) -> None:
    model = tiny_model("llama")
    forward = model.forward
    model.forward = functools.wraps(forward)(lambda *inputs, **named: forward(*inputs, **named))
    tiny_trainer(tmp_path, model, bf16=True).evaluate()
    with pytest.raises(ValueError, match="forward put in the place"):
        check_nothing_attached(model, family_of(model), compiled=False)
