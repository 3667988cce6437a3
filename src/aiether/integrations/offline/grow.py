"""Grow a checkpoint on the disk into another one, without ever holding the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from aiether import __version__
from aiether.growth import (
    PLACEMENTS,
    Family,
    GrowthConfig,
    GrowthPlan,
    TrainingState,
    block_tensors,
    check_blocks_match,
    check_routed_groups,
    family_of,
    grow_config,
)
from aiether.growth.config import MIN_SNAPSHOTS

from .._files import write_json
from . import _distributed, _sources
from ._dcp import DistributedFolder
from ._grown import GrownTensors
from ._history import StoredHistory
from ._sources import ModelConfig, Source, find_source, in_order
from ._tensors import StoredTensors
from ._trainer import grow_optimizer, meta_model
from ._write import Progress, check_new, check_room, copy_file, new_folder, shard_bytes, write_sharded

RECORD = "aiether_growth.json"
CARRIED = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.j*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
"""Files beside the weights that belong to the grown model too."""

TRAINER_FILES = ("trainer_state.json", "training_args.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""Files of a Trainer that do not depend on the depth: copied unopened."""


@dataclass(frozen=True, kw_only=True)
class GrownCheckpoint:
    """What was done: where it lies, the plan, what was measured for each new tensor, the bytes written."""

    path: Path
    kind: _sources.Kind
    step: int | None
    plan: GrowthPlan
    tensor_metrics: dict[str, dict[str, Any]]
    nbytes: int
    has_optimizer: bool


def grow_checkpoint(
    path: str | Path,
    output_dir: str | Path,
    *,
    to_layers: int,
    growth: GrowthConfig,
    history: Sequence[str | Path] = (),
    config: str | Path | None = None,
    max_layers: int | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
    progress: Progress | None = None,
) -> GrownCheckpoint:
    """Write `path`, grown to `to_layers` layers, to the new folder `output_dir`.

    Reads model folders with safetensors, Trainer checkpoints (whose optimizer state, scheduler and step go
    on), folders of torch.distributed.checkpoint, and aiether's checkpoints and run folders (the newest one).
    Memory for about one block is needed, whatever the size of the model. `growth` chooses `placement`, `init`
    with its settings, and `moments`.

    Parameters
    ----------
    path, output_dir
        What is read, and the folder that is made of it; it appears when it is whole.
    history
        For `init="geometric"`: at least two earlier checkpoints of the same run.
    config
        The model's config.json, for a checkpoint that has none beside it.
    max_layers
        The planned final depth, for the scale of random output projections; default `to_layers`.
    max_shard_size
        Limit of one safetensors file, such as "5GB".
    progress
        Is told how many bytes of tensors are written, of how many.

    Raises
    ------
    ValueError
        For anything that cannot work, before anything is written; or if the disk fills up.
    """
    growth.validate()
    shard = shard_bytes(max_shard_size)
    output = Path(output_dir)
    check_new(output)
    source = find_source(path)
    if source.kind == "file":
        raise ValueError(f"{str(path)!r} is a single file: name the folder of the model")
    model_config = ModelConfig.read(_config_path(source, config))
    job = _prepare(source, model_config, growth, to_layers, history, max_layers or to_layers, seed)
    check_room(output, _total(job.grown, source))
    with new_folder(output) as folder:
        _write(folder, source, model_config, job, shard, progress or (lambda done, total: None))
        write_json(folder / RECORD, _record(source, job, growth, seed))
        nbytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return GrownCheckpoint(
        path=output,
        kind=source.kind,
        step=source.step,
        plan=job.grown.plan,
        tensor_metrics=job.grown.metrics,
        nbytes=nbytes,
        has_optimizer=job.has_optimizer,
    )


@dataclass(frozen=True)
class _Job:
    grown: GrownTensors
    folder: DistributedFolder | None
    history: tuple[Source, ...]
    after: dict[str, Any]
    write_optimizer: Callable[[Path], None] | None = None

    @property
    def has_optimizer(self) -> bool:
        return self.write_optimizer is not None or (self.folder is not None and self.folder.has_optimizer)


def _prepare(
    source: Source,
    config: ModelConfig,
    growth: GrowthConfig,
    to_layers: int,
    history: Sequence[str | Path],
    final_depth: int,
    seed: int,
) -> _Job:
    folder = DistributedFolder(source.path) if source.kind == "distributed" else None
    tensors = folder.model if folder else source.tensors()
    family = family_of(config.full, names=tensors)
    depth = family.depth(config.full)
    if to_layers <= depth:
        raise ValueError(f"to_layers is {to_layers}, the model has {depth} layers already: ask for more")
    if final_depth < to_layers:
        raise ValueError(f"max_layers is {final_depth}, below to_layers ({to_layers}): raise it")
    plan = GrowthPlan(depth, PLACEMENTS[growth.placement](depth, to_layers), growth.init, growth.placement)
    check_routed_groups(config.full, plan)
    after = grow_config(config.full, plan, family)
    _check_layers(config.full, after, plan, family)
    state = TrainingState(config=config.full, tensors=tensors, step=source.step or 0)
    past = _past(source, history, growth)
    grown = GrownTensors(
        state,
        plan,
        family=family,
        growth=growth,
        history=_history(source, tensors, past, plan, family) if past else None,
        final_depth=final_depth,
        seed=seed,
    )
    optimizer = None
    if source.kind == "trainer":
        path = source.path / _sources.OPTIMIZER
        optimizer = grow_optimizer(path, before=config, after=after, plan=plan, family=family, growth=growth)
    return _Job(grown, folder, tuple(past), after, optimizer)


def _check_layers(before: dict[str, Any], after: dict[str, Any], plan: GrowthPlan, family: Family) -> None:
    """Raise ValueError if the configuration ties a layer's form to its index, so that moving changes it."""
    kinds = before.get("architectures") or [None]
    if not hasattr(transformers, str(kinds[0])):  # a model that transformers cannot build
        return
    small, large = meta_model(before), meta_model(after)
    if family.blocks in dict(small.named_modules()):
        check_blocks_match(small, large, plan, family)


def _past(source: Source, history: Sequence[str | Path], growth: GrowthConfig) -> list[Source]:
    """The earlier checkpoints, oldest first; the one that grows comes after them."""
    if growth.init != "geometric":
        if history:
            raise ValueError(f"history is only used by init 'geometric', not {growth.init!r}: leave it out")
        return []
    if len(history) + 1 < MIN_SNAPSHOTS:
        raise ValueError(
            f"init 'geometric' continues the path of at least {MIN_SNAPSHOTS} checkpoints: name "
            f"{MIN_SNAPSHOTS - 1} or more earlier ones with --history, or take init 'copy'"
        )
    ordered = in_order([*map(find_source, history), source])
    if ordered[-1] != source:
        raise ValueError(
            f"{str(ordered[-1].path)!r} (step {ordered[-1].step}) comes after {str(source.path)!r} (step "
            f"{source.step}), which is to grow: history means earlier checkpoints"
        )
    return ordered[:-1]


def _history(
    source: Source,
    tensors: StoredTensors,
    past: Sequence[Source],
    plan: GrowthPlan,
    family: Family,
) -> StoredHistory:
    blocks = block_tensors(tensors, family)
    if not plan.sources <= blocks.keys():
        raise ValueError(
            f"{str(source.path)!r} holds layers {list(blocks)}, its configuration states {plan.depth_before}"
        )
    names = [
        name
        for layer in sorted(plan.sources)
        for name in blocks[layer].values()
        if tensors.spec(name).dtype.is_floating_point
    ]
    return StoredHistory([*past, source], [*(each.tensors() for each in past), tensors], names)


def _config_path(source: Source, config: str | Path | None) -> Path:
    place = source.path if config is None else Path(config)
    return place / _sources.CONFIG if place.is_dir() else place


def _total(grown: GrownTensors, source: Source) -> int:
    """Bytes of the grown folder, roughly: moments grow with the tensors."""
    factor = 1
    if source.kind == "trainer":
        factor = 1 + (source.path / _sources.OPTIMIZER).stat().st_size / max(grown.old_nbytes, 1)
    elif source.kind == "distributed":
        factor = sum(file.stat().st_size for file in source.path.iterdir()) / max(grown.old_nbytes, 1)
    return int(grown.nbytes * factor)


def _write(
    folder: Path,
    source: Source,
    config: ModelConfig,
    job: _Job,
    max_shard_size: int,
    progress: Progress,
) -> None:
    grown = job.grown
    (folder / _sources.CONFIG).write_text(json.dumps(config.changed_to(job.after), indent=2) + "\n")
    for pattern in CARRIED:
        _carry(source.path, folder, pattern)
    if job.folder is not None:
        _distributed.write_grown(folder, job.folder, grown, _counter(grown.nbytes, progress))
    else:
        write_sharded(folder, grown, max_shard_size, _counter(grown.nbytes, progress))
    if source.kind == "trainer":
        for pattern in TRAINER_FILES:
            _carry(source.path, folder, pattern)
        assert job.write_optimizer is not None
        job.write_optimizer(folder / _sources.OPTIMIZER)


def _carry(source: Path, target: Path, pattern: str) -> None:
    for file in source.glob(pattern):
        if file.is_file() and not (target / file.name).exists():
            copy_file(file, target / file.name)


def _counter(total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return wrote


def _record(source: Source, job: _Job, growth: GrowthConfig, seed: int) -> dict[str, Any]:
    """What was done, beside the weights: enough to do it again."""
    return {
        "aiether": __version__,
        "source": source.label,
        "step": source.step,
        "history": [past.label for past in job.history],
        "plan": job.grown.plan.to_dict(),
        "moments": growth.moments if job.has_optimizer else None,
        "seed": seed,
        "final_depth": job.grown.final_depth,
        "tensors": job.grown.metrics,
    }
