from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from aiether.data import prepare
from aiether.training.config import resolve, write_config
from aiether.training.generate import find_model, generate, load_tokenizer

END = "<|endoftext|>"
CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 over single bytes, saved as any Hugging Face model."""
    path = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, END])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, bos_token=END)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(
            n_layer=1,
            n_head=2,
            n_embd=16,
            n_positions=CONTEXT,
            vocab_size=257,
            bos_token_id=256,
            eos_token_id=256,
            initializer_range=0.5,
        )
    ).save_pretrained(path)
    return path


def test_greedy_is_deterministic_whatever_the_seed(folder: Path) -> None:
    texts = {generate(folder, "ab", max_new_tokens=8, temperature=0, seed=seed) for seed in (0, 1)}
    assert len(texts) == 1
    assert texts.pop().startswith("ab")


def test_the_seed_decides_a_sample_and_the_global_state_stays(folder: Path) -> None:
    def sample(seed: int) -> str:
        return generate(folder, "ab", max_new_tokens=12, temperature=2.0, seed=seed)

    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    texts = [sample(seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-6}], ids=str)
def test_the_narrowest_sampling_is_greedy(folder: Path, narrow: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"temperature": 5.0, **narrow}
    greedy = generate(folder, "ab", max_new_tokens=8, temperature=0)
    assert generate(folder, "ab", max_new_tokens=8, **settings) == greedy
    assert generate(folder, "ab", max_new_tokens=8, temperature=5.0) != greedy


def test_a_text_may_outgrow_the_context(folder: Path) -> None:
    prompt = "a" * (CONTEXT + 5)
    text = generate(folder, prompt, max_new_tokens=3 * CONTEXT, temperature=2.0, seed=3)
    assert text.startswith(prompt)
    again = generate(folder, "ab", max_new_tokens=3 * CONTEXT, temperature=0)
    assert again.startswith(generate(folder, "ab", max_new_tokens=CONTEXT - 2, temperature=0))


def test_an_empty_prompt_starts_from_the_start_token(folder: Path) -> None:
    assert generate(folder, "", max_new_tokens=4, temperature=0) != ""


def test_a_run_folder_gives_its_final_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "final")
    assert find_model(tmp_path) == tmp_path / "final"
    assert generate(tmp_path, "ab", max_new_tokens=4, temperature=0) == generate(
        folder, "ab", max_new_tokens=4, temperature=0
    )


def test_a_tokenizer_may_be_named_and_must_exist(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    expected = generate(folder, "ab", max_new_tokens=4, temperature=0)
    for tokenizer in (folder, folder / "tokenizer.json"):
        assert generate(tmp_path, "ab", max_new_tokens=4, temperature=0, tokenizer=tokenizer) == expected
    with pytest.raises(ValueError, match="--tokenizer"):
        generate(tmp_path, "ab")
    with pytest.raises(ValueError, match="neither"):
        generate(tmp_path, "ab", tokenizer=tmp_path / "none")


@pytest.mark.parametrize("inside", [".", "checkpoints/step-1"])
def test_an_unfinished_run_has_the_tokenizer_of_its_data(tmp_path: Path, inside: str) -> None:
    text = tmp_path / "book.txt"
    text.write_text("\n\n".join(f"line {i} of a small book" for i in range(400)))
    config = resolve(
        "report", {}, {"dataset_path": str(text), "vocab_size": 300, "cache_dir": str(tmp_path / "cache")}
    )
    run_dir = tmp_path / "run"
    (run_dir / inside).mkdir(parents=True)
    write_config(run_dir / "config.yaml", config)
    tokenizer = load_tokenizer(run_dir / inside, run_dir / inside)
    assert len(tokenizer) == prepare(config).vocab_size
    assert tokenizer.decode(tokenizer("a small book")["input_ids"]) == "a small book"


def test_a_process_that_loads_models_knows_our_own_type() -> None:
    code = (
        "import aiether.training.generate; from transformers import CONFIG_MAPPING; "
        "assert 'lahr' in CONFIG_MAPPING"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        generate(tmp_path / "missing", "ab")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"neither config\.json"):
        generate(tmp_path, "ab")


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}, {"max_new_tokens": 0}],
    ids=str,
)
def test_sampling_settings_that_mean_nothing_are_refused(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        generate(folder, "ab", **setting)


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.suffix == ".json":
            shutil.copy(path, tmp_path)
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*is not read"):
        generate(tmp_path, "ab")
