"""What toroidal attention costs beside plain attention: a whole layer of Phi-2's shape, forward and backward.

    python benchmarks/toroidal_speed.py --device cuda            # one GPU, about 4 minutes
    python benchmarks/toroidal_speed.py --device cpu --lengths 128 --width 160 --heads 2

A layer of transformers' Phi (width 2,560, 32 heads of 80), one window, forward and backward for its input
and its weights, in bfloat16 on CUDA; arms take turns, a figure is the median over rounds. The layer is timed
as it is and compiled (on CUDA replayed as CUDA graphs), and its attention alone, from queries, keys and
values on. Plain attention is that of PyTorch's flash kernels, which the torus uses too; on CUDA also cuDNN's,
plain and for the torus (backend="cudnn").

Beside the time: peak memory (CUDA alone), and the arithmetic over that of plain attention, as it is computed
and as a kernel of its own would need it: of the attention, and of the layer's products with the pairs that a
causal mask leaves. `bias_bytes`: of N D x N D in float32, which nothing makes.

Writes benchmarks/results/toroidal_speed_DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PhiConfig, PhiForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import aiether
from _machine import about
from aiether.toroidal import set_progress

CUDNN = "plain, cuDNN"
PARTS = ("layer", "layer, compiled", "attention")
ARMS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    CUDNN: None,
    "D=1, chordal": {"platters": 1},
    "D=1, harmonics": {"platters": 1, "distance": "harmonics"},
    "D=1, triangle": {"platters": 1, "distance": "triangle"},
    "D=2, chordal": {"platters": 2},
    "D=4, chordal": {"platters": 4},
    "D=1, chordal, cuDNN": {"platters": 1, "backend": "cudnn"},
    "D=2, chordal, cuDNN": {"platters": 2, "backend": "cudnn"},
    "D=4, chordal, cuDNN": {"platters": 4, "backend": "cudnn"},
}


class ByCuDNN(nn.Module):
    """The layer with attention by cuDNN, in a frame of its own: compiled code knows no global switch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given: Any, **named: Any) -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.layer(*given, **named)


class Arm:
    """One layer, converted or not."""

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        torch.manual_seed(0)
        options = ARMS[name]
        config = PhiConfig(
            vocab_size=64,
            hidden_size=given.width,
            intermediate_size=4 * given.width,
            num_hidden_layers=1,
            num_attention_heads=given.heads,
            max_position_embeddings=max(given.lengths),
            use_cache=False,
        )
        dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
        self.model: Any = PhiForCausalLM(config)
        self.model.to(given.device, dtype)
        if options is not None:
            aiether.retrofit(self.model, layers=[0], **options)
            set_progress(self.model, 1.0)
        self.device, self.dtype, self.cudnn = given.device, dtype, name == CUDNN
        self.attention = self.model.model.layers[0].self_attn
        self.layer = ByCuDNN(self.model.model.layers[0]) if self.cudnn else self.model.model.layers[0]
        self.compiled: Any = torch.compile(
            self.layer, mode="reduce-overhead" if given.device == "cuda" else "default", dynamic=False
        )

    def step(self, length: int, part: str) -> None:
        """Forward and backward, of the layer for its weights and its input, or of its attention alone."""
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)
        if part == "attention":
            self._attend(length)
        else:
            self._pass(self.layer if part == "layer" else self.compiled, length)
        self.model.zero_grad(set_to_none=True)

    def _pass(self, layer: Any, length: int) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        hidden = self._random(1, length, self.model.config.hidden_size)
        places = torch.arange(length, device=self.device)[None]
        rotary = self.model.model.rotary_emb(hidden, position_ids=places)
        output = layer(hidden, attention_mask=None, position_embeddings=rotary, position_ids=places)
        output = output[0] if isinstance(output, tuple) else output
        output.float().square().mean().backward()

    def _attend(self, length: int) -> None:
        attention = self.attention
        heads = self.model.config.num_attention_heads
        given = [self._random(1, heads, length, attention.head_dim) for _ in range(3)]
        function = ALL_ATTENTION_FUNCTIONS[self.model.config._attn_implementation]
        output, _ = function(attention, *given, None, scaling=attention.scaling)
        output.backward(output.detach())

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_()


def arithmetic(options: dict[str, Any] | None, head_dim: int) -> dict[str, float]:
    """Attention's products over plain attention's: as computed, and as one kernel for it would need them."""
    if options is None:
        return {"computed": 1.0, "needed": 1.0}
    platters = options["platters"]
    waves = {"chordal": 3, "harmonics": 9, "triangle": 0}[options.get("distance", "chordal")]
    halves = 3 * waves  # in half precision, each in two parts
    values = head_dim / platters if options.get("backend") == "cudnn" else head_dim
    computed = platters**2 * (head_dim + halves + values) / (2 * head_dim)
    needed = platters**2 * (head_dim + waves + head_dim / platters) / (2 * head_dim)
    return {"computed": computed, "needed": needed}


def of_layer(attention: dict[str, float], width: int, length: int) -> dict[str, float]:
    """The layer's products over the plain layer's: 24 w^2 FLOPs a token, and 2 N w of causal attention."""
    others, plain = 24 * width**2, 2 * length * width
    return {kind: (others + ratio * plain) / (others + plain) for kind, ratio in attention.items()}


def measure(arms: dict[str, Arm], part: str, length: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, in turns, and of the layer as it is peak memory beyond the weights."""
    cuda = next(iter(arms.values())).device == "cuda"
    times = 5 if cuda else 1
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peak: dict[str, int] = {}
    for name, arm in arms.items():
        for _ in range(3):
            arm.step(length, part)
        if cuda and part == "layer":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            arm.step(length, part)
            torch.cuda.synchronize()
            peak[name] = torch.cuda.max_memory_allocated() - before
    for _ in range(rounds):
        for name, arm in arms.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(times):
                arm.step(length, part)
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - began) / times)
    plain = median(seconds["plain"])
    rows: dict[str, dict[str, float]] = {}
    for name in arms:
        rows[name] = {"seconds": median(seconds[name]), "ratio": median(seconds[name]) / plain}
        if name in peak:
            rows[name] |= {"peak_bytes": peak[name], "peak_ratio": peak[name] / peak["plain"]}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="plain among them")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--commit")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    content = about(seeds=[0], commit=given.commit) | {"device": given.device, "lengths": {}}
    content |= {"width": given.width, "heads": given.heads}
    if given.device == "cuda":
        content["gpu"] = torch.cuda.get_device_name()
    told = {name: arithmetic(ARMS[name], given.width // given.heads) for name in given.arms}
    content["arithmetic"] = told
    arms = {name: Arm(name, given) for name in given.arms if given.device == "cuda" or "cuDNN" not in name}
    out = given.out or Path(__file__).parent / "results" / f"toroidal_speed_{given.device}.json"
    for part in given.parts:
        for length in given.lengths:
            layers = {name: of_layer(told[name], given.width, length) for name in arms}
            bias = {f"D={d}": 4 * (length * d) ** 2 for d in (1, 2, 4, 8)}
            found = content["lengths"].setdefault(str(length), {"bias_bytes": bias, "arithmetic": layers})
            torch.compiler.reset()  # all arms share code, and only so many forms of it are compiled
            timed = {  # FlexAttention brings kernels that are compiled already
                name: arm for name, arm in arms.items() if part != "layer, compiled" or "triangle" not in name
            }
            found[part] = measure(timed, part, length, given.rounds)
            out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for name, row in found[part].items():
                needed = told[name] if part == "attention" else layers[name]
                memory = f", memory {row['peak_ratio']:.2f}" if "peak_ratio" in row else ""
                print(
                    f"N={length} {part}, {name}: {1e3 * row['seconds']:.2f} ms, {row['ratio']:.2f}x "
                    f"(arithmetic {needed['computed']:.2f}x, needed {needed['needed']:.2f}x){memory}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
