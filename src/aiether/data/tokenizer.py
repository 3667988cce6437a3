"""Byte-level BPE: trained on the data, or read from a path; written as a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from aiether.data._hash import file_hash
from aiether.data._reach import no_answer
from aiether.data._text import END_OF_TEXT

_END_CANDIDATES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
_FOLDER_PATTERNS = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "*.model")
_FOLDER_PATTERNS += ("encoder.json",)
_HUB_PATTERNS = (*_FOLDER_PATTERNS, "config.json")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class TextTokenizer:
    """A `tokenizers.Tokenizer` and the token that ends a document."""

    backend: Tokenizer
    eos_token: str
    special_tokens: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A text that happens to spell <|endoftext|> is text: the token itself marks documents only.
        self.backend.encode_special_tokens = True

    @property
    def eos_token_id(self) -> int:
        """The id that stands between documents."""
        token_id = self.backend.token_to_id(self.eos_token)
        assert token_id is not None
        return token_id

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        return [item.ids for item in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decoded_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the text that ids stand for."""
        return len(self.backend.decode(ids, skip_special_tokens=True).encode())

    def save(self, folder: Path) -> None:
        """Write a folder that `AutoTokenizer.from_pretrained` loads without aiether."""
        folder.mkdir(parents=True)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "bos_token": self.eos_token,
            **self.special_tokens,
            "eos_token": self.eos_token,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE with GPT-2's division into words; id 0 is <|endoftext|>.

    It has fewer than `vocab_size` entries when no pair of tokens occurs twice any more. Equal texts give
    an equal tokenizer. Source: Sennrich et al. 2016; Radford et al. 2019, section 2.2.
    """
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return TextTokenizer(backend, END_OF_TEXT)


def load_tokenizer(path: str) -> TextTokenizer:
    """Read a tokenizer.json file, a tokenizer folder, or the tokenizer of that name on the Hub.

    A folder is Hugging Face's or holds GPT-2's original encoder.json and vocab.bpe.

    Raises ValueError when the path is missing, is no tokenizer, or has no end-of-text token.
    """
    location = _located(path)
    folder = location if location.is_dir() else location.parent
    settings = _folder_settings(folder) if location.is_dir() else {}
    file = location / "tokenizer.json" if location.is_dir() else location
    try:
        backend = Tokenizer.from_file(str(file)) if file.is_file() else _older_form(folder, settings)
    except Exception as error:  # the library raises nothing narrower for a malformed file
        raise ValueError(
            f"tokenizer {path!r} cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); "
            "allowed are a tokenizer.json, a folder written by save_pretrained, a folder with encoder.json "
            "and vocab.bpe, and a name on the Hub"
        ) from error
    return TextTokenizer(backend, _end_token(backend, settings, path), settings)


def tokenizer_hash(path: str) -> str:
    """SHA-256 over the files of a tokenizer."""
    location = _located(path)
    files = (
        [location]
        if location.is_file()
        else sorted(
            {file for pattern in _FOLDER_PATTERNS for file in location.glob(pattern) if file.is_file()}
        )
    )
    if not files:
        raise ValueError(
            f"tokenizer {path!r} is a folder without a tokenizer; needed is a tokenizer.json (or vocab.json "
            "and merges.txt, or encoder.json and vocab.bpe); give the folder that save_pretrained wrote"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file_hash(file))
    return digest.hexdigest()


def _located(path: str) -> Path:
    """The file or folder of that name; a name on the Hub is downloaded once, its tokenizer files alone.

    Without a network it is taken from the Hub's own cache, where it lies there.
    """
    location = Path(path).expanduser()
    if location.exists():
        return location
    if not _HUB_NAME.fullmatch(path):
        raise ValueError(
            f"tokenizer {path!r} does not exist; allowed are a tokenizer.json, a tokenizer folder and a name "
            "on the Hub such as gpt2; check the path"
        )
    import huggingface_hub  # needed for a name alone

    away = no_answer(path, "model")
    try:
        found = huggingface_hub.snapshot_download(
            path, allow_patterns=list(_HUB_PATTERNS), local_files_only=away is not None
        )
        return Path(found)
    except Exception as error:  # of several libraries: no such name, no rights, not in the cache
        reason = away or error
        raise ValueError(
            f"tokenizer {path!r} does not exist here, and as a name on the Hub it cannot be downloaded "
            f"({(str(reason) or type(reason).__name__).splitlines()[0]}); check the name and the network, or "
            "give a tokenizer.json or a folder (where there is a network: "
            f"AutoTokenizer.from_pretrained({path!r}).save_pretrained(folder))"
        ) from error


def _folder_settings(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's tokenizer_config.json names, such as {"eos_token": "</s>"}."""
    file = folder / "tokenizer_config.json"
    stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = stored.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    return found


def _older_form(folder: Path, settings: dict[str, str]) -> Tokenizer:
    vocabulary, merges = folder / "encoder.json", folder / "vocab.bpe"
    if vocabulary.is_file() and merges.is_file():
        return _byte_level(models.BPE.from_file(str(vocabulary), str(merges)))
    return _converted(folder, settings)


def _byte_level(model: models.BPE) -> Tokenizer:
    """A byte-level BPE with GPT-2's division into words."""
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _converted(folder: Path, settings: dict[str, str]) -> Tokenizer:
    """A folder of the older form (vocab.json and merges.txt, or a sentencepiece model)."""
    from transformers import AutoTokenizer  # heavy, and needed for this form alone

    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if isinstance(value := getattr(loaded, name, None), str):
            settings.setdefault(name, value)
    return loaded.backend_tokenizer


def _end_token(backend: Tokenizer, settings: dict[str, str], path: str) -> str:
    for token in (settings.get("eos_token"), *_END_CANDIDATES):
        if token is not None and backend.token_to_id(token) is not None:
            return token
    raise ValueError(
        f"tokenizer {path!r} has no token that ends a document; looked for the eos_token of its "
        f"tokenizer_config.json and {', '.join(_END_CANDIDATES)}; add one and save the tokenizer again"
    )
