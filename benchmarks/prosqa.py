"""ProsQA: latent iterations against pause tokens, more layers and no thought, accuracy by hops.

    python benchmarks/prosqa_data.py ../shared/data/prosqa           # once, on the CPU: runs/prosqa/prosqa.pt
    python benchmarks/prosqa.py --device cuda --seeds 3

A row is the facts of a graph, "Is Tom a lempus or yumpus?", `###` and the answer. All arms train on the same
rows and steps. At first the chain of steps from question to answer is written out; stage by stage its first
steps are left out (`<skip n>` says how many), until nothing is left of it. Between these rows others ask
about a later node of the path, of at first one hop, and are answered at once. The curriculum is every arm's:

- `none`: the answer at once.
- `pause`: pause tokens between question and answer.
- `latent`: a block that is iterated behind the layers; every token takes all iterations. Its frozen copy then
  gets a halting head in a second stage, measured at several thresholds.
- `sampled`: the same block, its halting learned by sampled exits.
- `deeper`: as many layers as `latent` has layers and iterations, for as many FLOPs.
- `steps`: the chain always written out, in training and when it is asked.

Rows never repeat: graphs get new words and a new order of facts each time. Shown are the choice between the
two concepts offered (chance: 50 %) and free exact match, by hops. Writes benchmarks/results/prosqa.json after
every run; runs that it holds already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from _machine import about
from aiether.adaptive import LahrConfig, LahrForCausalLM, LatentSettings, insert_pauses, set_halt_q
from aiether.adaptive.second_stage import renew_halting_head, train_halting_head
from aiether.growth import family_of
from aiether.integrations._model import compile_blocks
from prosqa_data import (
    ANSWER,
    ASK,
    CONCEPTS,
    FIRST_CONCEPT,
    FIRST_NAME,
    IS,
    MOST_STEPS,
    NAMES,
    OR,
    PAD,
    PAUSE,
    PREPARED,
    SKIP,
    STOP,
    VOCABULARY,
)
from prosqa_shown import show

RESULT = Path(__file__).parent / "results" / "prosqa.json"
ARMS = ("none", "pause", "latent", "sampled", "deeper", "steps")
THRESHOLDS = (0.5, 0.75, 0.9, 0.95, 0.98, 0.99)
MOST_HOPS = 9
"""Of any evaluation set; chains of so many steps are written out at most."""
CURRICULUM = 0.5
"""The share of training in which steps are still written out, but for the arm `steps`."""
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What all arms of a result share; another shape is another result."""

    steps: int
    batch: int
    width: int
    heads: int
    layers: int
    iterations: int
    pauses: int
    lr: float
    head_batches: int
    tau: float


@dataclass(frozen=True)
class Job:
    """One arm of one seed, and where it runs."""

    arm: str
    seed: int
    shape: Shape
    data: Path
    device: str
    compiled: bool
    evaluated: int | None = None
    name: str = field(default="", compare=False)


# ---- rows


def question(rows: Rows) -> Tensor:
    """The facts and what is asked, int64 (B, 3 * MOST_EDGES + 6); filled up in front."""
    edges = rows["edges"].long()
    stops = torch.where(edges[..., :1] == PAD, PAD, STOP)
    root, options = rows["path"][:, :1].long(), rows["options"].long()
    word = torch.full_like(root, IS), torch.full_like(root, OR), torch.full_like(root, ASK)
    asked = [word[0], root, options[:, :1], word[1], options[:, 1:], word[2]]
    return torch.cat([torch.cat([edges, stops], -1).flatten(1), *asked], dim=-1)


def hops_of(rows: Rows) -> Tensor:
    """int64 (B,)."""
    return (rows["path"] != PAD).sum(-1) - 1


def reply(rows: Rows, left_out: Tensor) -> Tensor:
    """What follows a question: `<skip n>`, the other steps, `###`, the answer; without steps no `<skip n>`.

    int64 (B, 1 + 3 * MOST_STEPS + 4), filled up behind.
    """
    path, hops = rows["path"].long(), hops_of(rows)[:, None]
    step = torch.arange(MOST_STEPS, device=path.device)[None]
    steps = torch.stack([path[:, :MOST_STEPS], path[:, 1 : MOST_STEPS + 1]], -1)
    steps = torch.cat([steps, torch.full_like(steps[..., :1], STOP)], -1)
    steps = torch.where((step < hops)[..., None], steps, PAD).flatten(1)
    target = path.gather(1, hops)
    answer = torch.cat(
        [torch.full_like(target, ANSWER), path[:, :1], target, torch.full_like(target, STOP)], dim=-1
    )
    skipped = torch.minimum(left_out[:, None], hops)
    place = torch.arange(1 + 3 * MOST_STEPS + 4, device=path.device)[None]
    whole = torch.cat([steps, answer, torch.full_like(target, PAD)], dim=-1)
    at = place - 1 + 3 * skipped + (skipped == hops)  # no `<skip n>` where nothing is left of the chain
    at = torch.where(at >= 3 * hops, 3 * MOST_STEPS + at - 3 * hops, at)
    tokens = whole.gather(1, at.clamp(0, whole.shape[1] - 1))
    first = torch.where(skipped == hops, ANSWER, SKIP + skipped)
    return torch.where(place == 0, first, tokens)


def training_rows(rows: Rows, left_out: Tensor, pauses: int) -> Rows:
    """Inputs and labels; scored is what follows the first token of the reply."""
    asked, said = question(rows), reply(rows, left_out)
    input_ids = torch.cat([asked, said], dim=-1)
    scored = said.masked_fill(said == PAD, -100)
    scored[:, 0] = -100
    labels = torch.cat([torch.full_like(asked, -100), scored], dim=-1)
    paused = insert_pauses(input_ids, asked.shape[1], pauses, PAUSE, labels=labels)
    return {"input_ids": paused.input_ids, "labels": paused.labels}


def reworded(rows: Rows, generator: torch.Generator) -> Rows:
    """Other words for the nodes, another order of the facts and of the options."""
    count, device = len(rows["path"]), rows["path"].device
    words = torch.arange(len(VOCABULARY), device=device).repeat(count, 1)
    for first, number in ((FIRST_NAME, len(NAMES)), (FIRST_CONCEPT, len(CONCEPTS))):
        order = torch.rand(count, number, generator=generator, device=device).argsort(-1)
        words[:, first : first + number] = first + order
    found = {name: words.gather(1, rows[name].long().flatten(1)).view_as(rows[name]) for name in rows}
    edges = found["edges"]
    order = torch.rand(edges.shape[:2], generator=generator, device=device)
    order = torch.where(edges[..., 0] == PAD, -1.0, order).argsort(-1)  # fillers stay in front
    swap = torch.rand(count, 1, generator=generator, device=device) < 0.5
    options = torch.where(swap, found["options"].flip(-1), found["options"])
    return {
        "edges": edges.gather(1, order[..., None].expand_as(edges)),
        "path": found["path"],
        "options": options,
    }


def from_later(rows: Rows, start: Tensor) -> Rows:
    """The questions about later nodes of the paths: as many hops fewer."""
    path = rows["path"]
    at = torch.arange(path.shape[1], device=path.device)[None] + start[:, None]
    return {**rows, "path": path.gather(1, at.clamp_max(path.shape[1] - 1))}


def lesson(arm: str, progress: float, rows: Rows, generator: torch.Generator) -> tuple[Rows, Tensor]:
    """The rows of one training step, and how many steps of each chain are left out.

    Half of the rows (later a quarter) ask about a later node of the path, and the answer follows at once: at
    most 1 hop at first, then 2 and so on. Of the others the chain is written out, without its first steps
    as far as the stage has come (a third: without fewer); in the end without all.
    """
    hops = hops_of(rows)
    count, device = len(hops), hops.device
    stage = min(MOST_STEPS, int(progress / CURRICULUM * MOST_STEPS))
    learning = progress < CURRICULUM
    easy = torch.rand(count, generator=generator, device=device) < (0.5 if learning else 0.25)
    few = torch.randint(1, min(stage + 1, MOST_STEPS) + 1, (count,), generator=generator, device=device)
    fewer = torch.randint(stage + 1, (count,), generator=generator, device=device)
    review = torch.rand(count, generator=generator, device=device) < 1 / 3
    stages = torch.full_like(hops, stage) if learning else torch.full_like(hops, MOST_STEPS)
    left_out = torch.where(review & learning, fewer, stages).masked_fill(easy, MOST_STEPS)
    rows = from_later(rows, torch.where(easy, (hops - few).clamp_min(0), 0))
    return rows, torch.zeros_like(hops) if arm == "steps" else left_out


# ---- models


def build(arm: str, shape: Shape, seed: int) -> LahrForCausalLM:
    """An arm's model, in float32."""
    torch.manual_seed(seed)
    thinks = {"latent": "fixed", "sampled": "learned"}.get(arm)
    latent = None if thinks is None else LatentSettings(iterations=shape.iterations, halting=thinks)  # type: ignore[arg-type]
    config = LahrConfig(
        num_hidden_layers=shape.layers + (shape.iterations if arm == "deeper" else 0),
        hidden_size=shape.width,
        intermediate_size=shape.width * 8 // 3,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=shape.width**-0.5,  # look-ups form sooner than from 0.02
        latent=None if latent is None else vars(latent),
        pad_token_id=None,
        use_cache=False,
    )
    return LahrForCausalLM(config)


def train(job: Job, model: LahrForCausalLM, rows: Rows) -> dict[str, Any]:
    """AdamW with warm-up and a linear decay over the last 40 %; the loss each so often, and seconds."""
    shape, device = job.shape, torch.device(job.device)
    generator = torch.Generator(device).manual_seed(job.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=shape.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    model.train()
    begin, shown, losses = time.perf_counter(), max(1, shape.steps // 40), []
    for step in range(shape.steps):
        progress = step / shape.steps
        rate = shape.lr * min((step + 1) / (0.04 * shape.steps + 1), (1 - progress) / 0.4, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(rows["path"]), (shape.batch,), generator=generator, device=device)
        batch = reworded({name: tensor[chosen] for name, tensor in rows.items()}, generator)
        batch, left_out = lesson(job.arm, progress, batch, generator)
        data = training_rows(batch, left_out, shape.pauses if job.arm == "pause" else 0)
        with _autocast(device):
            loss = model(**data).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % shown == 0:
            losses.append([step + 1, loss.item()])
            passed = time.perf_counter() - begin
            left = passed / (step + 1) * (shape.steps - step - 1)
            print(f"  {job.name} step {step + 1} loss {losses[-1][1]:.3f}, {left:.0f} s left", flush=True)
    return {"seconds": time.perf_counter() - begin, "losses": losses}


def _autocast(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


# ---- measuring


@dataclass(frozen=True)
class Answers:
    """What was said to each question.

    Attributes
    ----------
    chosen: bool, the target was likelier than the other concept, where the answer's concept stands.
    exact: bool, the likeliest words were the answer.
    iterations: where that concept was decided; tokens: mean over the tokens of the question. 0: none.
    """

    chosen: Tensor
    exact: Tensor
    iterations: Tensor
    tokens: Tensor


@torch.no_grad()
def answers(model: LahrForCausalLM, rows: Rows, arm: str, pauses: int) -> Answers:
    """Asks, and lets the likeliest words follow until the answer's concept."""
    asked, device = question(rows), rows["path"].device
    if arm == "pause":
        asked = insert_pauses(asked, asked.shape[1], pauses, PAUSE).input_ids
    count, length = asked.shape
    most = 3 * MOST_HOPS + 3 if arm == "steps" else 2
    said = torch.full((count, 1 + most), PAD, device=device)
    said[:, 0] = SKIP if arm == "steps" else ANSWER
    target = rows["path"].long().gather(1, hops_of(rows)[:, None])
    options = rows["options"].long()
    other = options.sum(-1, keepdim=True) - target
    root = rows["path"][:, :1].long()
    chosen, exact = torch.zeros(2, count, dtype=torch.bool, device=device)
    iterations = torch.zeros(count, device=device)
    tokens = torch.zeros(count, device=device)
    for number in range(most):
        output = model.model(input_ids=torch.cat([asked, said], -1), use_cache=False)
        logits = model.lm_head(output.last_hidden_state[:, length + number]).float()
        said[:, number + 1] = logits.argmax(-1)
        if number == 0:
            continue
        here = said[:, number - 1] == ANSWER  # the concept comes now
        chosen |= here & (logits.gather(1, target) > logits.gather(1, other))[:, 0]
        exact |= here & (said[:, number + 1] == target[:, 0]) & (said[:, number] == root[:, 0])
        if output.iterations is not None:
            iterations = torch.where(here, output.iterations[:, length + number], iterations)
            present = asked != PAD
            tokens = (output.iterations[:, :length] * present).sum(-1) / present.sum(-1)
    return Answers(chosen, exact, iterations, tokens)


def measure(job: Job, model: LahrForCausalLM, sets: dict[str, Rows]) -> dict[str, Any]:
    """Each evaluation set's figures, by hops too."""
    model.eval()
    found = {}
    for name, rows in sets.items():
        parts = []
        for begin in range(0, len(rows["path"]), 500):
            part = {key: tensor[begin : begin + 500] for key, tensor in rows.items()}
            with torch.compiler.set_stance("force_eager"), _autocast(torch.device(job.device)):
                parts.append(answers(model, part, job.arm, job.shape.pauses))
        whole = [torch.cat([vars(part)[key] for part in parts]).float() for key in vars(parts[0])]
        hops = hops_of(rows)
        by = {int(hop): _figures(whole, hops == hop) for hop in hops.unique()}
        found[name] = {**_figures(whole, hops > 0), "by_hops": by}
    return found


def _figures(columns: Sequence[Tensor], rows: Tensor) -> dict[str, float]:
    names = ("choice", "exact", "iterations", "question_iterations")
    means = {name: column[rows].mean().item() for name, column in zip(names, columns, strict=True)}
    return {"problems": int(rows.sum()), **means}


def second_stage(job: Job, fixed: LahrForCausalLM, rows: Rows, sets: dict[str, Rows]) -> dict[str, Any]:
    """A halting head on a frozen copy of a model that was trained with all iterations."""
    shape, device = job.shape, torch.device(job.device)
    model = copy.deepcopy(fixed)
    renew_halting_head(model)
    generator = torch.Generator(device).manual_seed(job.seed + 999)
    none_left = torch.full((shape.batch,), MOST_STEPS, device=device)
    batches = []
    for _ in range(shape.head_batches):
        chosen = torch.randint(len(rows["path"]), (shape.batch,), generator=generator, device=device)
        batch = reworded({name: tensor[chosen] for name, tensor in rows.items()}, generator)
        batches.append(training_rows(batch, none_left, 0))
    with torch.compiler.set_stance("force_eager"), _autocast(device):
        losses = train_halting_head(model, batches, tau=shape.tau, lr=0.05)
    return {"head_loss": [losses[0], fmean(losses[-10:])], "at": at_thresholds(job, model, sets)}


def at_thresholds(job: Job, model: LahrForCausalLM, sets: dict[str, Rows]) -> dict[str, Any]:
    """What is measured at each halting threshold."""
    found = {}
    for q in THRESHOLDS:
        set_halt_q(model, q)
        found[str(q)] = measure(job, model, sets)
    return found


def run(job: Job) -> dict[str, Any]:
    """One arm of one seed: trained and measured."""
    torch.set_num_threads(1 if job.device == "cuda" else torch.get_num_threads())
    device = torch.device(job.device)
    prepared = torch.load(job.data, weights_only=True)
    rows = _on(prepared["train"], device)
    sets = {name: _on(tensors, device, job.evaluated) for name, tensors in prepared["evaluation"].items()}
    model = build(job.arm, job.shape, job.seed)
    torch.nn.Module.to(model, device)
    if job.compiled:
        compile_blocks(model, family_of(model))
    result: dict[str, Any] = {"arm": job.arm, "seed": job.seed}
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    result |= train(job, model, rows)
    if job.arm == "sampled":
        set_halt_q(model, 1.0)
    result["sets"] = measure(job, model, sets)
    some = {name: sets[name] for name in sets if name.startswith(("prosqa", "far"))}
    if job.arm == "latent":
        result["second_stage"] = second_stage(job, model, rows, some)
    if job.arm == "sampled":
        result["halted"] = {"at": at_thresholds(job, model, some)}
    return result


def _on(rows: Rows, device: torch.device, count: int | None = None) -> Rows:
    return {name: tensor[:count].to(device) for name, tensor in rows.items()}


# ---- results


def work(jobs: Sequence[Job], workers: int, done: Callable[[dict[str, Any]], None]) -> None:
    """Runs all jobs, so many at a time; says how long the rest will take."""
    begin = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for number, future in enumerate(as_completed([pool.submit(run, job) for job in jobs]), start=1):
            result = future.result()
            done(result)
            passed = time.perf_counter() - begin
            left = passed / number * (len(jobs) - number)
            print(
                f"{number} of {len(jobs)} runs after {passed:.0f} s, {left:.0f} s left: {result['arm']}, "
                f"seed {result['seed']}, test {result['sets']['prosqa_test']['choice']:.3f}",
                flush=True,
            )


def parser() -> argparse.ArgumentParser:
    """All that can be chosen."""
    assert __doc__
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, default=PREPARED.parent, help="folder of prosqa.pt")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--seeds", type=int, default=3, help="how many")
    options.add_argument("--workers", type=int, default=1, help="runs at the same time")
    options.add_argument("--compile", action="store_true")
    options.add_argument("--evaluated", type=int, help="questions of each set (default: all)")
    options.add_argument("--output", type=Path, default=RESULT)
    for name, value in {
        "steps": 1500, "batch": 256, "width": 256, "heads": 8, "layers": 4, "iterations": 4, "pauses": 6,
        "lr": 1e-3, "head_batches": 60, "tau": 0.01,
    }.items():  # fmt: skip
        options.add_argument(f"--{name}", type=type(value), default=value)
    return options


def main() -> None:
    arguments = parser().parse_args()
    shape = Shape(**{name: getattr(arguments, name) for name in Shape.__dataclass_fields__})
    result: dict[str, Any] = {**about(seeds=[]), "shape": vars(shape), "runs": []}
    result["gpu"] = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    if arguments.output.exists():
        earlier = json.loads(arguments.output.read_text(encoding="utf-8"))
        if earlier["shape"] != vars(shape):
            raise SystemExit(
                f"{arguments.output} holds runs of another shape: move it away, or choose --output"
            )
        result = earlier
    prepared = torch.load(arguments.data / "prosqa.pt", weights_only=True)
    result["data"] = prepared["statistics"]
    held = {(each["arm"], each["seed"]) for each in result["runs"]}
    jobs = [
        Job(arm, seed, shape, arguments.data / "prosqa.pt", arguments.device, arguments.compile,
            arguments.evaluated, name=f"{arm}/{seed}")
        for seed in range(arguments.seeds)
        for arm in arguments.arms
        if (arm, seed) not in held
    ]  # fmt: skip

    def done(found: dict[str, Any]) -> None:
        result["runs"] = sorted([*result["runs"], found], key=lambda each: (each["seed"], each["arm"]))
        result["seeds"] = sorted({each["seed"] for each in result["runs"]})
        unfinished = arguments.output.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(arguments.output)

    work(jobs, arguments.workers, done)
    show(result, ARMS)


if __name__ == "__main__":
    main()
