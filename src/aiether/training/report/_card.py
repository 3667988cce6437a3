"""The model card of a run: what the model is, what it learned from, what it cost, how to load it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from aiether.training import _format as fmt
from aiether.training.report import _facts as facts
from aiether.training.report.markdown import code, markdown_table, plain
from aiether.training.report.pages import write_whole
from aiether.training.report.run_records import Run, as_number, load_run

_RECIPE = (
    "arch",
    "n_layer",
    "max_layers",
    "optimizer",
    "lr",
    "schedule",
    "lr_warmup_steps",
    "weight_decay",
    "batch_size",
    "gradient_accumulation_steps",
    "context_length",
    "dropout",
    "bf16",
    "seed",
    "trigger",
    "placement",
    "init",
    "protocol",
)
_LIMITS = """\
- It continues text. It was not trained to follow instructions, and nobody has looked at what it says.
- It knows what the text named above says, with its errors and its bias.
- The loss was measured on documents of the same source that were held out. It compares with other models only
  under the same tokenizer; bits per byte compare under any.
- One run with one seed: differences near 0.01 nats can come from the seed alone.
- No licence is stated here. The text that it learned from may set terms of its own."""


def write_cards(run_dir: Path | str) -> tuple[Path, ...]:
    """Writes `final/README.md` of a run and of its baselines, where there is a final model, from the records.

    Equal records give an equal card. What a user or a text could have put into it is shown as code.

    Raises:
        ValueError: `run_dir` holds no run, or a damaged file; the message says which.
    """
    run_dir = Path(run_dir)
    run = load_run(run_dir)
    arms = [
        (run, run_dir),
        *((_as_run(each, run), run_dir / f"baseline-{each.name}") for each in run.baselines),
    ]
    return tuple(_write(each, arm_dir / "final") for each, arm_dir in arms if (arm_dir / "final").is_dir())


def _as_run(baseline: Run, run: Run) -> Run:
    """A baseline with what it shares with its run, which alone has it on record."""
    config = {**run.config, "trigger": "never", "n_layer": baseline.latest("depth")}
    name = f"{run.name}-{baseline.name}"
    return replace(baseline, name=name, config=config, environment=run.environment)


def _write(run: Run, final_dir: Path) -> Path:
    path = final_dir / "README.md"
    write_whole(path, str(model_card(run, final_dir)).encode())
    return path


def model_card(run: Run, final_dir: Path) -> ModelCard:
    """The card of a run whose model lies in `final_dir`."""
    tags = ["aiether", "pretrained-from-scratch", *(["progressive-growth"] if run.growths else [])]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=tags, model_name=run.name
    )
    sections = (
        f"# {code(run.name)}\n\n{facts.headline(run)} Trained from scratch with aiether.",
        plain("\n".join(facts.gaps(run))),
        _loading(),
        "## What it is\n\n" + markdown_table(("", ""), _identity(run, final_dir)),
        _depth(run),
        "## Recipe\n\n" + markdown_table(("setting", "value"), _recipe(run)),
        _beside(run),
        "## Versions\n\n" + markdown_table(("", ""), _versions(run)),
        f"## Limits\n\n{_LIMITS}",
    )
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n", ignore_metadata_errors=False)


def _loading() -> str:
    return """## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "final"  # this folder
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

It is an ordinary transformers model; aiether is not needed."""


def _identity(run: Run, final_dir: Path) -> Iterable[tuple[str, str]]:
    config = json.loads((final_dir / "config.json").read_text(encoding="utf-8"))
    data = run.environment.get("data") or {}
    loss, bits = run.latest_loss, facts.latest_bits(run)
    yield "architecture", code((config.get("architectures") or ["?"])[0])
    yield "layers", fmt.count(run.latest("depth"))
    yield "parameters", fmt.count(_parameters(final_dir))
    yield "context", f"{run.config.get('context_length', '?')} tokens"
    yield "vocabulary", fmt.count(config.get("vocab_size"))
    yield "trained on", code(str(data.get("source", "unknown")))
    yield "documents", fmt.count(data.get("documents"))
    yield "data fingerprint", code(str(data.get("fingerprint", "unknown")))
    yield "tokens seen", f"{fmt.count(run.latest('tokens'))} in {run.last_step:,} steps"
    yield "compute", f"{fmt.scientific(run.latest('flops'))} FLOPs, attention and output head included"
    yield "training time", fmt.duration(run.latest("elapsed_s"))
    yield "held-out loss", f"{fmt.loss(loss)} nats per token"
    yield "held-out bits per byte", fmt.loss(bits)


def _parameters(final_dir: Path) -> int | None:
    """Stored numbers: a matrix that is both embedding and output head counts once."""
    total = 0
    for path in sorted(final_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total or None


def _depth(run: Run) -> str:
    if not run.growths:
        return ""
    rows = [
        (
            f"{int(event['step']):,}",
            f"{event.get('depth_before', '?')} to {event.get('depth_after', '?')}",
            fmt.loss(as_number(event.get("loss_before"))),
            fmt.loss(as_number(event.get("loss_after"))),
            code(fmt.plan_words(event.get("plan") or {})),
        )
        for event in run.growths
    ]
    columns = ("step", "layers", "loss before", "loss after", "plan")
    return "## How it grew\n\n" + markdown_table(columns, rows)


def _recipe(run: Run) -> Iterable[tuple[str, str]]:
    yield "preset", code(str(run.config.get("preset", "?")))
    for name in _RECIPE:
        if name in run.config:
            yield code(name), code(fmt.anything(run.config[name]))


def _beside(run: Run) -> str:
    """The baselines, whichever side wins."""
    if not run.baselines:
        return ""
    grids = (facts.outcome_table(run), *facts.cost_tables(run))
    tables = "\n\n".join(
        markdown_table([*map(plain, g.columns)], [[*map(plain, row)] for row in g.rows]) for g in grids
    )
    sentences = plain("\n".join(facts.verdicts(run)))
    return "\n\n".join(filter(None, ("## Beside a static model", sentences, tables)))


def _versions(run: Run) -> Iterable[tuple[str, str]]:
    for name in ("aiether", "transformers", "torch", "python", "platform", "processor"):
        if run.environment.get(name):
            yield name, code(str(run.environment[name]))
