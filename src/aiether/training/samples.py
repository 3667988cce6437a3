"""A sample of text from each stage: the same prompt and seed, so that what changed is the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from aiether.adaptive import LahrForCausalLM, trace_tokens

from .generate import continue_text, prompt_ids

NEW_TOKENS = 120


class Sampler:
    """Continues one prompt with a model in mid-training, and leaves model and random state as they were.

    Raises
    ------
    ValueError
        When made, if the prompt is empty and the tokenizer has no token to start from.
    """

    def __init__(self, tokenizer_dir: Path, prompt: str, seed: int) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            tokenizer_dir, local_files_only=True, trust_remote_code=False
        )
        self.prompt, self.seed = prompt, seed
        prompt_ids(self.tokenizer, prompt)

    def sample(self, model: PreTrainedModel) -> str:
        """The prompt and up to `NEW_TOKENS` tokens, drawn at `generate`'s temperature."""
        training = model.training
        model.eval()
        try:
            # A cache and a window that grows would have compiled blocks compiled again at every length.
            with torch.compiler.set_stance("force_eager"):
                return continue_text(
                    model, self.tokenizer, self.prompt, max_new_tokens=NEW_TOKENS, seed=self.seed
                )
        finally:
            model.train(training)

    def trace(self, model: PreTrainedModel, text: str) -> dict[str, Any] | None:
        """Where the model's computation goes in a text, by tokens; None for a model that decides nothing.

        `pieces` of the text; for each of the routed `layers` which pieces it `processed` (0 or 1);
        `iterations` that each piece took. The text is cut where the model's context ends.
        """
        if not isinstance(model, LahrForCausalLM):
            return None
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        most = model.config.max_position_embeddings
        ids, spans = encoded["input_ids"][:most], encoded["offset_mapping"][:most]
        with torch.compiler.set_stance("force_eager"):
            trace = trace_tokens(model, torch.tensor(ids, dtype=torch.long, device=model.device))
        if not trace.layers and not trace.iterations:
            return None
        return {
            "pieces": _pieces(text, spans),
            "layers": list(trace.layers),
            "processed": [list(map(int, row)) for row in trace.processed],
            "iterations": list(trace.iterations),
        }


def _pieces(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """The text cut into its tokens; of tokens that share a character the first has it."""
    ends = [0, *(end for _, end in spans)]
    return [text[max(start, before) : end] for (start, end), before in zip(spans, ends, strict=False)]
