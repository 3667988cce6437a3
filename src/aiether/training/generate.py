"""Text from the model of a run, of a checkpoint, or of any Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from aiether.integrations import CheckpointStore, without_progress_bars

_TOKENIZER_FILE = "tokenizer.json"
_LEVELS = 4
"""A checkpoint of a baseline lies three folders below its run: run/baseline/checkpoints/step."""


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    device: str = "auto",
) -> str:
    """The prompt and its continuation, up to `max_new_tokens` or the end-of-text token.

    `path` is a run folder (its final model, else its newest complete checkpoint) or a folder that
    `save_pretrained` wrote; weights are read from safetensors only, and no code from the folder runs. A
    text longer than the model's context goes on from its later half. `temperature` 0 is greedy. The same
    seed gives the same text on the same machine; the global random state is left as it was.

    Raises
    ------
    ValueError
        For a folder without a model or a tokenizer, and for sampling settings that mean nothing.
    """
    _validate(max_new_tokens, temperature, top_k, top_p)
    model_dir = find_model(path)
    target = _device(device)
    text = load_tokenizer(path, model_dir, tokenizer)
    with without_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    model.to(target).eval()
    return continue_text(
        model,
        text,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )


def continue_text(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The prompt and what a model in evaluation mode adds to it; the global random state is left as it was.

    Raises
    ------
    ValueError
        For an empty prompt that the tokenizer has no token to start from.
    """
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        ids = _extend(model, ids, max_new_tokens, tokenizer.eos_token_id, sampling)
    return prompt + str(tokenizer.decode(ids[0], skip_special_tokens=True))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> Tensor:
    """The prompt as ids, int64 of shape (1, length); an empty one is the token that a text starts with."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert isinstance(ids, Tensor)
    return ids.long() if ids.numel() else torch.tensor([[_start_token(tokenizer)]])


def find_model(path: str | Path) -> Path:
    """The folder with the weights: `path` itself, its final model, or its newest complete checkpoint."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is not a folder; name a run folder or a Hugging Face model folder")
    for candidate in (path, path / "final"):
        if (candidate / "config.json").is_file():
            return candidate
    newest = CheckpointStore(path).latest()
    if newest is None:
        raise ValueError(
            f"{str(path)!r} holds no model: neither config.json, final/ nor a complete checkpoint is there; "
            "a run has one after its first save"
        )
    return newest.path


def load_tokenizer(
    path: str | Path, model_dir: Path, tokenizer: str | Path | None = None
) -> PreTrainedTokenizerFast:
    """The tokenizer given, else the model folder's own, else the one that the run's data was packed with."""
    source = Path(tokenizer) if tokenizer is not None else model_dir
    if source.is_file():
        return PreTrainedTokenizerFast(tokenizer_file=str(source))
    if (source / _TOKENIZER_FILE).is_file():
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer {str(tokenizer)!r} is neither a tokenizer.json file nor a folder with one"
        )
    return AutoTokenizer.from_pretrained(_tokenizer_of_run(Path(path)), local_files_only=True)


def _tokenizer_of_run(path: Path) -> Path:
    """Where the data of the run that `path` is, or lies in, keeps its tokenizer."""
    from aiether.data import prepare  # only an unfinished run needs the data, which is read from its cache

    from .config import read_config

    for folder in [path.resolve(), *path.resolve().parents][:_LEVELS]:
        if (folder / "config.yaml").is_file():
            directory = prepare(read_config(folder / "config.yaml")).tokenizer_dir
            if directory is not None:
                return directory
    raise ValueError(f"no tokenizer lies in or belongs to {str(path)!r}; name one with --tokenizer")


def _extend(model: Any, ids: Tensor, count: int, end: Any, sampling: dict[str, Any]) -> Tensor:
    """The new ids (1, <= count); beyond the context length the later half of the text is the new context."""
    context = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + count
    start = ids.shape[1]
    while (left := start + count - ids.shape[1]) > 0:
        window = ids if ids.shape[1] < context else ids[:, -max(1, context // 2) :]
        grown = model.generate(
            window,
            attention_mask=torch.ones_like(window),
            max_new_tokens=min(left, context - window.shape[1]),
            pad_token_id=end if end is not None else 0,
            eos_token_id=end,
            use_cache=True,
            **sampling,
        )
        ids = torch.cat([ids, grown[:, window.shape[1] :]], dim=1)
        if end is not None and ids[0, -1] == end:
            break
    return ids[:, start:]


def _start_token(tokenizer: PreTrainedTokenizerFast) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ValueError("the prompt is empty and the tokenizer has no token to start from; give a prompt")


def _validate(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or greater")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1, or left out")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must be greater than 0 and at most 1")


def _device(name: str) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available.get(name):
        raise ValueError(f"device {name!r} is not available here; use --device auto or --device cpu")
    return torch.device(name)
