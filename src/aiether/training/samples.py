"""A sample of text from each stage: the same prompt and seed, so that what changed is the model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

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
