"""Decoding for adaptive_speed.py: tokens a second in the steady state, after the first few.

`growing`: `generate` as it is. `static`: `generate` with a static cache, whose step transformers compiles and
replays as CUDA graphs (on a CPU it runs as it is). `step`: that compiled step alone, again and again, without
what `generate` does between two steps on the host.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import CompileConfig, StaticCache
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from aiether.adaptive.cache import CompactLayer
from aiether.adaptive.static_cache import StaticCompactLayer

WAYS = ("growing", "static", "step")
_WARM = 8
"""Tokens that are not timed; graphs are recorded with the second and the third."""


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Clock(StoppingCriteria):
    """Stops nothing; takes the time at the last token that is not timed."""

    def __init__(self, device: str) -> None:
        self.device, self.tokens, self.started = device, 0, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.tokens += 1
        if self.tokens == _WARM:
            self.started = now(self.device)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Decoder:
    """One model behind random prompts, one way; a static cache and what was compiled stay between calls."""

    def __init__(self, model: Any, device: str, batch: int, prompt: int, new: int, way: str) -> None:
        assert new > _WARM
        self.model, self.device, self.new, self.way = model, device, new, way
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(device)
        self.mask = torch.ones_like(self.ids)
        self.cache: StaticCache | None = None
        self.compiled: CompileConfig | None = None
        if way != "growing":
            self.cache = StaticCache(config=model.config, max_cache_len=prompt + new)
        if way != "growing" and device == "cuda":
            self.compiled = CompileConfig(mode="reduce-overhead", fullgraph=True, dynamic=False)

    def seconds(self) -> dict[str, float]:
        """For whole texts (`generate`) and behind their first tokens (`decode`), or for steps (`step`)."""
        if self.way == "step":
            return {"step": self._steps()}
        clock, started = _Clock(self.device), now(self.device)
        self.text(self.new, clock)
        ended = now(self.device)
        return {"generate": ended - started, "decode": ended - clock.started}

    @torch.no_grad()
    def text(self, new: int, clock: _Clock | None = None) -> Any:
        """What `generate` returns for `new` tokens."""
        given: dict[str, Any] = {}
        if self.cache is not None:
            self.cache.reset()
            given = {"past_key_values": self.cache, "compile_config": self.compiled}
        torch.manual_seed(0)
        return self.model.generate(
            self.ids,
            attention_mask=self.mask,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=True,
            top_k=0,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([] if clock is None else [clock]),
            **given,
        )

    @torch.no_grad()
    def _steps(self) -> float:
        ids = self.text(1).sequences
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1,
            past_key_values=self.cache,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.full_like(ids[:, :1], self.ids.shape[1]),
            use_cache=True,
            logits_to_keep=1,  # as `generate` calls it: nothing is compiled anew
        )
        step = self.model if self.compiled is None else self.model.get_compiled_call(self.compiled)
        started = 0.0
        for token in range(1, self.new):
            if token == _WARM:
                started = now(self.device)
            step(**inputs, return_dict=True)
        return now(self.device) - started

    def share(self) -> float | None:
        """The share of the tokens that the routed layers process while decoding; None: there are none."""
        used: list[int] = []
        layers = 0
        for new in (1, self.new):
            caches: list[Any] = self.text(new).past_key_values.layers
            routed = [each for each in caches if isinstance(each, CompactLayer | StaticCompactLayer)]
            used.append(sum(int(layer.used_B.sum()) for layer in routed))
            layers = len(routed)
        return (used[1] - used[0]) / (len(self.ids) * (self.new - 1) * layers) if layers else None

    def tokens(self, what: str) -> int:
        """How many an entry of `seconds` is about."""
        return len(self.ids) * (self.new if what == "generate" else self.new - _WARM)


def decoding_seconds(decoders: dict[str, Decoder], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Each entry of `Decoder.seconds`, of each arm, in turns, after two calls that compile and record."""
    for arm, decoder in decoders.items():
        started = now(decoder.device)
        for _ in range(2):
            decoder.seconds()
        if decoder.compiled is not None:
            print(f"    {arm}, {decoder.way}: ready after {now(decoder.device) - started:.0f} s", flush=True)
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for arm, decoder in decoders.items():
            for what, seconds in decoder.seconds().items():
                found.setdefault(what, {}).setdefault(arm, []).append(seconds)
    return found
