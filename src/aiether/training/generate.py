"""Text from the model of a run, of a checkpoint, or of any Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import aiether.adaptive.model  # noqa: F401 - makes the model type lahr known to from_pretrained
from aiether.adaptive import set_halt_q
from aiether.adaptive.decoders import register_mixture_of_depths
from aiether.integrations import CheckpointStore, check_weights, read_mapping, without_progress_bars
from aiether.toroidal import load as load_toroidal
from aiether.toroidal import register_toroidal
from aiether.toroidal.storage import RECORD

from .config import check_text

_TOKENIZER_FILE, _SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
_COLDEST = 1e-6
"""Below it, logits divided by the temperature leave the range of float32."""
_REASON = 200
"""Characters of a library's own message that are worth a line."""
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
    halt_q: float | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str:
    """The prompt and its continuation, up to `max_new_tokens` or the end-of-text token.

    `path` is a run folder (its final model, else its newest complete checkpoint) or a folder that
    `save_pretrained` wrote. Weights are read from safetensors only, and code that lies in the folder runs
    with `trust_remote_code` only. A text longer than the model's context goes on from its later half.
    `temperature` 0 is greedy. `halt_q` says how long a model with latent reasoning thinks. The same seed
    gives the same text on the same machine; the global random state is left as it was.

    Raises
    ------
    ValueError
        For a folder without a model or a tokenizer, or with damaged ones, for a tokenizer that is not the
        model's, and for sampling settings that mean nothing.
    """
    _validate(max_new_tokens, temperature, top_k, top_p, seed)
    check_text("the prompt", prompt)
    model_dir = find_model(path)
    target = find_device(device)
    _check_folder(model_dir, trust_remote_code)
    text = load_tokenizer(path, model_dir, tokenizer, trust_remote_code=trust_remote_code)
    model = load_model(model_dir, trust_remote_code=trust_remote_code).to(target).eval()
    if halt_q is not None:
        set_halt_q(model, halt_q)
    ids = prompt_ids(text, prompt).to(target)
    _check_vocabulary(model, text, ids)
    _check_finite(model, ids)
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
        if any((candidate / name).is_file() for name in ("config.json", RECORD)):
            return candidate
    newest = CheckpointStore(path).latest()
    if newest is None:
        raise ValueError(
            f"{str(path)!r} holds no model: neither config.json, final/ nor a complete checkpoint is there; "
            "a run has one after its first save"
        )
    return newest.path


def load_model(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """The causal language model of a folder, every weight of it read from safetensors.

    A folder of a toroidal model's differences is put together with the model that it was made of.

    Raises
    ------
    ValueError
        For a damaged folder, weights that do not fill the model, and one that needs code of its own.
    """
    num_tensors = _check_folder(model_dir, trust_remote_code)
    if toroidal_base(model_dir) is not None:
        return _load_differences(model_dir, trust_remote_code)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    with without_progress_bars(), _readable(f"the model in {str(model_dir)!r}"):
        config = AutoConfig.from_pretrained(model_dir, **options)
        layers = getattr(config, "num_hidden_layers", None) or 0
        if layers > num_tensors:
            raise ValueError(f"config.json tells of {layers} layers, the weights are {num_tensors} tensors")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, config=config, use_safetensors=True, output_loading_info=True, **options
        )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {missing[0]} first")
    return model


def toroidal_base(model_dir: Path) -> str | None:
    """What a folder of a toroidal model's differences was made of, a folder or a name; None for others."""
    if not (model_dir / RECORD).is_file():
        return None
    base = read_mapping(model_dir / RECORD).get("base")
    if not isinstance(base, str):
        raise ValueError(f"{model_dir / RECORD} is damaged (it names no base): restore it")
    return base


def _load_differences(model_dir: Path, trusted: bool) -> Any:
    with without_progress_bars(), _readable(f"the model in {str(model_dir)!r}"):
        return load_toroidal(model_dir, use_safetensors=True, trust_remote_code=trusted)


def load_tokenizer(
    path: str | Path,
    model_dir: Path,
    tokenizer: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerFast:
    """The tokenizer given, else the model folder's own, else the one that the run's data was packed with.

    A folder of a toroidal model's differences has none: it is that of the model that it was made of.
    """
    base = toroidal_base(model_dir) if tokenizer is None else None
    if base is not None and not (model_dir / _TOKENIZER_FILE).is_file():
        if not Path(base).is_dir():
            with _readable(f"the tokenizer {base!r}"):
                return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
        path = model_dir = Path(base)
    source = Path(tokenizer) if tokenizer is not None else model_dir
    with _readable(f"the tokenizer {str(source)!r}"):
        if source.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(source))
        if (source / _TOKENIZER_FILE).is_file() or (
            trust_remote_code and (source / _SETTINGS_FILE).is_file()
        ):
            return AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=trust_remote_code
            )
    if (source / _SETTINGS_FILE).is_file() and "auto_map" in read_mapping(source / _SETTINGS_FILE):
        raise ValueError(_code_needed(source / _SETTINGS_FILE))
    if tokenizer is not None:
        raise ValueError(
            f"tokenizer {str(tokenizer)!r} is neither a tokenizer.json file nor a folder with one"
        )
    of_run = tokenizer_of_run(Path(path))
    if of_run is None:
        raise ValueError(f"no tokenizer lies in or belongs to {str(path)!r}; name one with --tokenizer")
    return AutoTokenizer.from_pretrained(of_run, local_files_only=True)


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged folder (nearly anything) into one clear line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= _REASON else f"{reason[:_REASON]}..."
        raise ValueError(f"{what} cannot be loaded ({reason}): restore its files, or name another") from error


def _check_folder(model_dir: Path, trusted: bool) -> int:
    """The tensors of a model folder, after a look at its files that needs no library to load them.

    A folder that brings its own classes is refused unless trusted; where transformers knows the model's type
    itself, its own classes are taken and the folder's are not looked at. So it is with a decoder that
    `add_mixture_of_depths` or `retrofit` has changed. Of a folder of differences its base is looked at.
    """
    if (base := toroidal_base(model_dir)) is not None:
        if not Path(base).is_dir():  # a name on the Hub
            return 0
        model_dir = Path(base)
        if not (model_dir / "config.json").is_file():
            raise ValueError(f"the base model {base!r} has no config.json: restore it")
    settings = read_mapping(model_dir / "config.json")
    model_type = settings.get("model_type")
    changed = register_mixture_of_depths(model_type) or register_toroidal(model_type)
    if "auto_map" in settings and not (changed or model_type in CONFIG_MAPPING) and not trusted:
        raise ValueError(_code_needed(model_dir / "config.json"))
    return check_weights(model_dir)


def _code_needed(file: Path) -> str:
    return (
        f"{file} asks for code that lies in its folder (auto_map), which is not run unasked: read it, and "
        "give --trust_remote_code if you trust it"
    )


def _check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> None:
    rows = model.get_input_embeddings().num_embeddings
    highest = max(int(ids.max()), tokenizer.vocab_size - 1)  # without tokens that were added afterwards
    if highest >= rows:
        raise ValueError(
            f"the tokenizer has the id {highest}, the model's vocabulary {rows} entries: they do not belong "
            "together; name the model's own with --tokenizer"
        )


def _check_finite(model: Any, ids: Tensor) -> None:
    """A model whose training diverged, or whose weights are damaged, talks nonsense or fails to sample."""
    with torch.no_grad():
        logits = model(ids[:, : _context(model, 1)]).logits
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model's predictions are not finite (NaN or infinite): its training diverged or its weights "
            "are damaged; take an earlier checkpoint"
        )


def _context(model: Any, otherwise: int) -> int:
    """Tokens that the model takes at once; `otherwise` where it does not say."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        return otherwise
    if not isinstance(context, int) or context < 2:
        raise ValueError(f"the model's max_position_embeddings is {context!r}: at least 2 are needed")
    return context


def run_of(path: str | Path) -> Path | None:
    """The run folder that `path` is, or lies in."""
    place = Path(path).resolve()
    folders = [place, *place.parents][:_LEVELS]
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


def tokenizer_of_run(path: Path) -> Path | None:
    """Where the data of the run that `path` is, or lies in, keeps its tokenizer; None where there is none."""
    from aiether.data import prepare  # only an unfinished run needs the data, which is read from its cache

    from .config import read_config

    run_dir = run_of(path)
    return None if run_dir is None else prepare(read_config(run_dir / "config.yaml")).tokenizer_dir


def _extend(model: Any, ids: Tensor, count: int, end: Any, sampling: dict[str, Any]) -> Tensor:
    """The new ids (1, <= count); beyond the context length the later half of the text is the new context."""
    context = _context(model, ids.shape[1] + count)
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


def _validate(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float, seed: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if temperature != 0 and not _COLDEST <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}: it must be 0 (greedy) or at least {_COLDEST}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be 0 to {2**32 - 1}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: it must be at least 1, or left out")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: it must be greater than 0 and at most 1")


def find_device(name: str) -> torch.device:
    """The device of that name, auto: an accelerator if any. Raises ValueError for one that is not here."""
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
