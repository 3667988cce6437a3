"""Speed of LAHR models against the dense model of the same depth: training, the trunk alone, and inference.

    python benchmarks/adaptive_speed.py --device cuda        # one GPU; with --decode growing about 5 minutes
    python benchmarks/adaptive_speed.py --device cpu         # two cores, smaller, about 10 minutes

The dense model is transformers' own Llama; `baseline` is LAHR without any part: the same model, with the
norm that LAHR takes where no gradient is needed. All arms of a shape are in memory at once and take turns;
a figure is the median over rounds. Training is forward, backward and fused AdamW; on CUDA in bfloat16 with
blocks and the output head compiled and replayed as CUDA graphs, as `aiether train --bf16 --compile` does.
Prefill and generation run in bfloat16 on CUDA, with thresholds calibrated on random tokens; rows have
different prompts and draw their tokens. Prefill is measured as it is and, on CUDA, with compiled blocks.
Decoding is generating without its first tokens, in three ways (`_decoding.py`): without compiling, with a
static cache (on CUDA compiled and replayed as CUDA graphs, in every arm), and that compiled step alone.
FLOPs are those of the closed form that the tests compare with a count.

Static decoding compiles once for each arm and size, most of its time, which is printed. A smaller run:
--decoding_only --shapes 1 --decode static step --arms dense baseline mod_only full
--decoding 8x256 64x256 256x1024

Writes benchmarks/results/adaptive_speed_DEVICE.json, again and again as it goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from _decoding import WAYS, Decoder, decoding_seconds, now
from _machine import about
from aiether.adaptive import LahrSettings, Routing
from aiether.evaluation import flops_per_token
from aiether.growth import family_of
from aiether.integrations import causal_loss
from aiether.integrations._model import compile_blocks
from aiether.training.model import build_model

RESULTS = Path(__file__).parent / "results"
_REFERENCE = {"n_layer": 8, "n_head": 8, "n_embd": 256, "context_length": 512, "vocab_size": 50257}
_NARROW = {"n_layer": 8, "n_head": 8, "n_embd": 512, "context_length": 512, "vocab_size": 4096}
_WIDE = {"n_layer": 8, "n_head": 16, "n_embd": 1024, "context_length": 1024, "vocab_size": 4096}
SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "cuda": {
        "width 512, 4,096 tokens": {**_NARROW, "batch_size": 64},
        "the reference's shape": {**_REFERENCE, "batch_size": 32},
        "width 1,024, 4,096 tokens": {**_WIDE, "batch_size": 16},
    },
    "cpu": {
        "width 512, 4,096 tokens": {**_NARROW, "batch_size": 1},
        "the reference's shape": {**_REFERENCE, "batch_size": 1},
    },
}
ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "baseline": {"lahr_condition": "baseline"},
    "mod_only": {"lahr_condition": "mod_only"},
    "mod_only, threshold": {"lahr_condition": "mod_only", "lahr_router": "threshold"},
    "full": {"lahr_condition": "full"},
}


class Arm:
    """One model, for training (with its optimizer) or for inference."""

    def __init__(
        self,
        settings: dict[str, Any] | None,
        shape: dict[str, int],
        device: str,
        *,
        inference: bool = False,
        compiled: bool = True,
        cuda_graphs: bool = False,
    ) -> None:
        self.shape, self.device = shape, device
        model_shape = {name: value for name, value in shape.items() if name != "batch_size"}
        lahr = None if settings is None else LahrSettings(**settings)
        model: Any = build_model(
            "llama" if lahr is None else "lahr",
            final_depth=shape["n_layer"],
            seed=0,
            dropout=0.0,
            eos_token_id=None,
            lahr=lahr,
            **model_shape,
        )
        dtype = torch.bfloat16 if inference and device == "cuda" else torch.float32
        self.model = model.to(device)
        if inference:
            self.calibrate()
        self.model.to(dtype).train(not inference)
        if device == "cuda" and compiled:
            compile_blocks(self.model, family_of(self.model), cuda_graphs=cuda_graphs)
        if not inference:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        size = (shape["batch_size"], shape["context_length"])
        self.ids = torch.randint(shape["vocab_size"], size, generator=generator).to(device)
        self.tokens = self.ids.numel()

    def calibrate(self) -> None:
        """Let thresholds follow the scores of random tokens, as in training; no weight moves."""
        vocabulary, length = self.shape["vocab_size"], self.shape["context_length"]
        if any(isinstance(module, Routing) for module in self.model.modules()):
            self.model.train()
            for seed in range(9):  # each pass takes over what the one before found
                generator = torch.Generator().manual_seed(seed)
                self.model.base_model(
                    input_ids=torch.randint(vocabulary, (1, length), generator=generator).to(self.device)
                )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def train(self) -> None:
        with self.autocast():
            if self.device == "cuda":
                loss = causal_loss(self.model, self.ids, self.ids, None)
            else:
                loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def trunk(self) -> None:
        with self.autocast():
            hidden = self.model.base_model(input_ids=self.ids).last_hidden_state
        hidden.float().mean().backward()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def prefill(self) -> None:
        self.model.base_model(input_ids=self.ids, use_cache=False)


def seconds(work: Callable[[], None], device: str, times: int) -> float:
    """Mean seconds of one call."""
    started = now(device)
    for _ in range(times):
        work()
    return (now(device) - started) / times


def in_turns(arms: dict[str, Arm], name: str, rounds: int, times: int) -> dict[str, list[float]]:
    """Seconds of a method of each arm, round by round, after one call that is not counted."""
    works = {arm: getattr(each, name) for arm, each in arms.items()}
    device = next(iter(arms.values())).device
    for work in works.values():
        for _ in range(3):  # compiled graphs are recorded with the second call
            work()
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, work in works.items():
            found[arm].append(seconds(work, device, times))
    return found


def measure(result: dict[str, Any], settings: argparse.Namespace, write: Callable[[], None]) -> None:
    """Put everything about one shape into its result, and write all results now and then."""
    shape, device = result["shape"], settings.device
    chosen = {name: ARMS[name] for name in settings.arms}
    if not (settings.inference_only or settings.decoding_only):
        arms = {
            name: Arm(each, shape, device, cuda_graphs=settings.cuda_graphs) for name, each in chosen.items()
        }
        for label in ("train", "trunk"):
            seen = in_turns(arms, label, settings.rounds, settings.times)
            note(result, label, seen, next(iter(arms.values())).tokens)
        del arms
        if device == "cuda":
            torch.cuda.empty_cache()
        if device == "cuda":
            arms = {
                name: Arm(each, shape, device, inference=True, cuda_graphs=settings.cuda_graphs)
                for name, each in chosen.items()
            }
            prefill(result, arms, "prefill, compiled", settings)
            write()
            del arms
            torch.cuda.empty_cache()
    arms = {name: Arm(each, shape, device, inference=True, compiled=False) for name, each in chosen.items()}
    note_size(result, arms)
    if not settings.decoding_only:
        prefill(result, arms, "prefill", settings)
        write()
    for batch, prompt in settings.sizes:
        for way in settings.decode:
            decode(result, arms, way, batch, prompt, settings)
            write()


def prefill(result: dict[str, Any], arms: dict[str, Arm], label: str, settings: argparse.Namespace) -> None:
    """Logit-free passes over whole windows, of all arms."""
    seen = in_turns(arms, "prefill", settings.rounds, settings.times)
    note(result, label, seen, next(iter(arms.values())).tokens)


def decode(
    result: dict[str, Any],
    arms: dict[str, Arm],
    way: str,
    batch: int,
    prompt: int,
    settings: argparse.Namespace,
) -> None:
    """One way and size of decoding, of all arms."""
    decoders = {
        name: Decoder(arm.model, settings.device, batch, prompt, settings.new, way)
        for name, arm in arms.items()
    }
    size = f"batch {batch}, prompt {prompt}{', static' if way == 'static' else ''}"
    for what, seen in decoding_seconds(decoders, max(3, settings.rounds // 2)).items():
        note(result, f"{what}, {size}", seen, next(iter(decoders.values())).tokens(what))
    for name, decoder in decoders.items():
        if way != "step":
            result["arms"][name][f"decode, {size}"]["routed_share"] = decoder.share()


def note_size(result: dict[str, Any], arms: dict[str, Arm]) -> None:
    """Put the arms' parameters and FLOPs into the result, and what the dense one's FLOPs are over theirs."""
    shape = result["shape"]
    head = 6 * shape["n_embd"] * shape["vocab_size"]
    for name, arm in arms.items():
        flops = flops_per_token(arm.model.config, shape["context_length"], shape["batch_size"])
        parameters = sum(p.numel() for p in arm.model.parameters())
        result["arms"][name] |= {
            "parameters": parameters,
            "flops_per_token": flops,
            "trunk_flops": flops - head,
        }
    dense = result["arms"]["dense"]
    for entry in result["arms"].values():
        entry["flops_ratio"] = dense["flops_per_token"] / entry["flops_per_token"]
        entry["trunk_flops_ratio"] = dense["trunk_flops"] / entry["trunk_flops"]


def note(result: dict[str, Any], label: str, found: dict[str, list[float]], tokens: int) -> None:
    """Put an arm's medians into the result: tokens a second, and how much faster than the dense one."""
    for name in found:
        median = statistics.median(found[name])
        faster = [a / b for a, b in zip(found["dense"], found[name], strict=True)]
        result["arms"][name][label] = {
            "tokens_per_s": tokens / median,
            "ratio": statistics.median(faster),
            "lowest_and_highest": [min(faster), max(faster)],
        }
    told = ", ".join(f"{name} {result['arms'][name][label]['ratio']:.2f}" for name in found)
    print(f"  {label}: {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--times", type=int, default=0, help="calls a round; 0: 10 on CUDA, 1 on a CPU")
    parser.add_argument(
        "--decoding", nargs="*", help="BATCHxPROMPT; default on CUDA 8x256 64x256 256x256 64x1024 256x1024"
    )
    parser.add_argument("--decode", nargs="*", choices=WAYS, help="default on CUDA all, on a CPU growing")
    parser.add_argument("--new", type=int, default=0, help="tokens a text; 0: 64 on CUDA, 16 on a CPU")
    parser.add_argument("--arms", nargs="*", choices=tuple(ARMS), default=list(ARMS), help="dense among them")
    parser.add_argument("--inference_only", action="store_true")
    parser.add_argument("--decoding_only", action="store_true")
    parser.add_argument("--shapes", type=int, default=9, help="how many of the shapes, in their order")
    parser.add_argument(
        "--cuda_graphs", action=argparse.BooleanOptionalAction, default=True, help="in training"
    )
    parser.add_argument("--commit", help="where the tree is no git checkout")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    if "dense" not in settings.arms:
        parser.error("--arms: the others are compared with dense, name it too")
    cuda = settings.device == "cuda"
    out = settings.out or RESULTS / f"adaptive_speed_{settings.device}.json"
    torch._dynamo.config.recompile_limit = 64  # arms and shapes share the classes
    settings.times = settings.times or (10 if cuda else 1)
    settings.new = settings.new or (64 if cuda else 16)
    settings.decode = settings.decode or (list(WAYS) if cuda else ["growing"])
    default = ["8x256", "64x256", "256x256", "64x1024", "256x1024"] if cuda else ["8x256", "64x256"]
    named = [each.split("x") for each in settings.decoding or default]
    settings.sizes = [(int(batch), int(prompt)) for batch, prompt in named]
    content = about(seeds=[0], commit=settings.commit) | {"device": settings.device, "shapes": {}}
    content["cuda_graphs"] = cuda and settings.cuda_graphs
    if cuda:
        content["gpu"] = torch.cuda.get_device_name()

    def write() -> None:
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    for label, shape in list(SHAPES[settings.device].items())[: settings.shapes]:
        print(label, flush=True)
        torch._dynamo.reset()  # or the second shape would be compiled for any size
        result = {"shape": shape, "arms": {name: {} for name in settings.arms}}
        content["shapes"][label] = result
        measure(result, settings, write)


if __name__ == "__main__":
    main()
