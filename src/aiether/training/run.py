"""The main job: text in, a grown model and its report out, in one folder that can be resumed."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from aiether.data import PackedData, prepare
from aiether.growth import GrowthConfig, growth_warnings
from aiether.integrations import (
    CheckpointStore,
    Interrupted,
    Row,
    RunFault,
    disk_full,
    hold,
    interrupted_status,
    is_disk_full,
    raise_interrupts,
    write_json,
)

from .arms import (
    ArmLength,
    ArmResult,
    Emit,
    check_final_depth,
    final_depth,
    run_arm,
    sampler,
    static_steps,
    tokens_per_step,
    windows,
)
from .attention_kernels import without_cudnn_attention
from .config import TrainConfig, read_config, write_config
from .display import DisplaySettings, TrainingDisplay, open_display
from .environment import environment
from .length import arm_length, check_length
from .report import write_cards, write_report
from .run_folder import check_changes, check_output_dir, check_place, check_unedited, read_record
from .tracking import TrackedRun, Tracking, check_trackers
from .trainer import build_arguments

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
REPORT = "report.html"
BASELINE = "baseline-static"
_MOVE_AWAY = "move it away and resume again: it is made anew"
_RESTORE = "restore it from a copy, or start a new run"


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where everything about it lies."""

    run_dir: Path
    status: Literal["finished", "interrupted"]
    grown: ArmResult
    baselines: tuple[ArmResult, ...]
    report: Path | None

    @property
    def exit_status(self) -> int:
        """0 when finished, else that of the signal: 130 for Ctrl-C, 143 for SIGTERM."""
        signals = [arm.signal for arm in (self.grown, *self.baselines) if arm.signal is not None]
        return interrupted_status(signals[0]) if signals else 0


def train(config: TrainConfig, *, report: bool = True) -> RunResult:
    """Run the main job from the start. Without `report` neither page nor model card is written in the end.

    Raises
    ------
    ValueError
        For settings, data or an output folder that cannot work, before any long work.
    RunFault
        For a full disk, a loss of NaN or too little memory; what was saved stays.
    Interrupted
        For a signal while nothing trains, or a second one.
    """
    run_dir = Path(config.output_dir or _default_output_dir(config)).expanduser()
    check_device(config)
    check_trackers(config.report_to)
    check_place(run_dir)
    with _attended(run_dir):
        check_output_dir(run_dir)
        return _execute(replace(config, output_dir=str(run_dir)), run_dir, resume=False, report=report)


def resume(
    run_dir: str | Path, changes: Mapping[str, Any] | None = None, *, report: bool = True
) -> RunResult:
    """Continue an interrupted, crashed or killed run from its newest complete checkpoint.

    `changes` are new values for settings in `CHANGEABLE`; the run keeps them.

    Raises
    ------
    ValueError
        If the folder holds no run, or one that is finished, or a change would change what a step consists of.
    RunFault, Interrupted
        As `train`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / CONFIG).is_file():
        raise ValueError(
            f"{str(run_dir)!r} holds no run ({CONFIG} is missing); name a run folder, as in runs/NAME"
        )
    with _attended(run_dir):
        config = read_config(run_dir / CONFIG)
        changes = check_changes(config, changes or {}, run_dir)
        _refuse_finished(run_dir)
        _check_trained_under(config, run_dir)
        if changes:
            config = _changed(config, changes)
            write_config(run_dir / CONFIG, config)
        check_device(config)
        check_trackers(config.report_to)
        return _execute(config, run_dir, resume=True, report=report)


def _refuse_finished(run_dir: Path) -> None:
    summary, report = run_dir / SUMMARY, run_dir / REPORT
    if not (summary.is_file() and report.is_file()):
        return
    if read_record(summary, lambda read: read["status"], _MOVE_AWAY) == "finished":
        raise ValueError(f"the run in {str(run_dir)!r} is finished; its report is {report}")


def _check_trained_under(config: TrainConfig, run_dir: Path) -> None:
    """Other settings over the same weights would train on, only otherwise, and without a word."""
    checkpoint = CheckpointStore(run_dir).latest()
    states = checkpoint.read_record().observers if checkpoint else []
    for trained in (state["config"] for state in states if "config" in state):
        check_unedited(config, trained, run_dir / CONFIG)


def _changed(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run that goes on with other settings, the same tokens a step among them."""
    new = replace(config, **changes)
    new.validate()
    if tokens_per_step(new) != tokens_per_step(config):
        raise ValueError(
            f"batch_size {new.batch_size} with gradient_accumulation_steps {new.gradient_accumulation_steps} "
            f"changes the tokens of a step: keep their product at "
            f"{config.batch_size * config.gradient_accumulation_steps}"
        )
    eval_windows = config.eval_batches * config.batch_size
    if eval_windows % new.batch_size:
        raise ValueError(
            f"batch_size {new.batch_size} does not divide the {eval_windows} windows of an evaluation: "
            "choose one that does"
        )
    return replace(new, eval_batches=eval_windows // new.batch_size)


@contextmanager
def _attended(run_dir: Path) -> Iterator[None]:
    """One process at a time, signals that clean up on the way out, and faults that say how to go on."""
    command = f"aiether train --resume {run_dir}"
    with hold(run_dir), raise_interrupts():
        try:
            yield
        except RunFault as fault:
            raise fault.resumed_by(command) from fault
        except (OSError, SafetensorError) as error:
            if not is_disk_full(error):
                raise
            what = getattr(error, "filename", None) or "a file of the run"
            begun = run_dir if (run_dir / CONFIG).exists() else None
            raise disk_full(error, str(what), run_dir, begun).resumed_by(command) from error
        except Interrupted as stop:
            begun = f"go on with {command}" if (run_dir / CONFIG).exists() else "nothing was trained yet"
            raise Interrupted(stop.signal_name, f"{stop}; {begun}") from None


def check_device(config: TrainConfig) -> None:
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if config.device in available and not available[config.device]():
        raise ValueError(f"device={config.device!r} is not available here; use --device auto or --device cpu")


def _execute(config: TrainConfig, run_dir: Path, *, resume: bool, report: bool) -> RunResult:
    with open_display(DisplaySettings.from_config(asdict(config))) as display, without_cudnn_attention():
        data = _prepare(config, display)
        if resume:
            _check_same_data(run_dir, data)
        else:
            _open_folder(config, data, run_dir)
        _describe_data(display, data)
        emit = _emitter(display)
        grown = ArmResult.read(run_dir) or _grown(config, data, run_dir, resume, emit)
        if grown.status == "finished" and config.trigger != "never" and grown.depth < final_depth(config):
            display.message(_stayed_small(config, grown))
        baselines: list[ArmResult] = []
        if grown.status == "finished" and config.baseline == "static":
            baselines.append(_static_baseline(config, data, run_dir, grown, emit))
        result = _conclude(run_dir, grown, tuple(baselines), report=report)
        display.finish(_closing(result))
    return result


def _prepare(config: TrainConfig, display: TrainingDisplay) -> PackedData:
    try:
        return prepare(config, progress=display.progress)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise disk_full(error, "the prepared data (cache_dir)", config.cache_root, None) from error


def _open_folder(config: TrainConfig, data: PackedData, run_dir: Path) -> None:
    """Make the run folder, after everything that can be refused has been."""
    windows(config, data, max_steps=1)
    arguments = build_arguments(config, max_steps=1, output_dir=run_dir)
    check_final_depth(config, data, arguments.device)
    sampler(config, data)
    check_length(config, data)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / ENVIRONMENT, environment(data))
    write_config(run_dir / CONFIG, config)  # last: from here on the folder is a run that can be resumed


def _check_same_data(run_dir: Path, data: PackedData) -> None:
    """Other tokens under the same embeddings would train on, only worse, and without a word."""
    path = run_dir / ENVIRONMENT
    if not path.is_file():
        raise ValueError(f"{path} is missing, which tells the run's data; restore it, or start a new run")
    started_on = read_record(path, lambda read: str(read["data"]["fingerprint"]), _RESTORE)
    if data.fingerprint != started_on:
        raise ValueError(
            f"the data of {str(run_dir)!r} has changed since the run started (fingerprint {started_on[:12]}, "
            f"now {data.fingerprint[:12]}): restore {data.source}, or start a new run"
        )


def _grown(config: TrainConfig, data: PackedData, run_dir: Path, resume: bool, emit: Emit) -> ArmResult:
    length = arm_length(config, data, run_dir, emit)
    for message in growth_warnings(config, total_steps=length.steps, depth=config.n_layer):
        emit("message", {"text": f"warning: {message}"})
    with _tracking("grown", config, run_dir, run_dir, emit) as tracked:
        return run_arm(
            "grown",
            config,
            config,
            data,
            run_dir,
            depth=config.n_layer,
            length=length,
            resume=resume,
            emit=tracked,
        )


def _static_baseline(
    config: TrainConfig, data: PackedData, run_dir: Path, grown: ArmResult, emit: Emit
) -> ArmResult:
    """The depth that the run reached, from the start, for the FLOPs that it took; everything else alike."""
    arm_dir, depth = run_dir / BASELINE, grown.depth
    if (finished := ArmResult.read(arm_dir)) is not None:
        return finished
    with _tracking("static", config, run_dir, arm_dir, emit) as tracked:
        return run_arm(
            "static",
            config,
            replace(GrowthConfig(), trigger="never", init="copy", protocol="none", max_layers=depth),
            data,
            arm_dir,
            depth=depth,
            length=ArmLength(static_steps(config, data, depth=depth, flops=grown.flops)),
            resume=True,
            emit=tracked,
        )


@contextmanager
def _tracking(arm: str, config: TrainConfig, run_dir: Path, arm_dir: Path, emit: Emit) -> Iterator[Emit]:
    """What an arm's rows are told to: the display and, beside it, the trackers."""
    environment = json.loads((run_dir / ENVIRONMENT).read_text())
    name = run_dir.resolve().name
    tracked = TrackedRun(
        id=f"{environment.get('run_id')}-{arm}",
        project=config.tracking_project,
        group=name,
        name=name if arm == "grown" else f"{name}-{arm}",
        arm=arm,
        run_dir=run_dir,
        arm_dir=arm_dir,
        settings=asdict(config) | {"arm": arm, "environment": environment},
    )
    openers = check_trackers(config.report_to)
    with Tracking(tracked, openers, lambda text: emit("message", {"text": text})) as tracking:

        def both(kind: str, row: Row) -> None:
            emit(kind, row)
            tracking.observe(kind, row)

        yield both


def _conclude(
    run_dir: Path, grown: ArmResult, baselines: tuple[ArmResult, ...], *, report: bool
) -> RunResult:
    done = all(arm.status == "finished" for arm in (grown, *baselines))
    status: Literal["finished", "interrupted"] = "finished" if done else "interrupted"
    (run_dir / REPORT).unlink(missing_ok=True)  # an interrupted run's; resume looks for the last one
    write_json(run_dir / SUMMARY, _summary(status, grown, baselines))
    if report:
        write_cards(run_dir)
    page = write_report(run_dir) if report else None
    return RunResult(run_dir, status, grown, baselines, page)


def _summary(status: str, grown: ArmResult, baselines: tuple[ArmResult, ...]) -> dict[str, Any]:
    return {**asdict(grown), "status": status, "baselines": [asdict(arm) for arm in baselines]}


def _closing(result: RunResult) -> dict[str, Any]:
    closing = _summary(result.status, result.grown, result.baselines)
    if result.report is not None:
        closing["report"] = str(result.report)
    if result.status == "interrupted":
        closing["resume"] = f"aiether train --resume {result.run_dir}"
    return closing


# -- what the terminal says -----------------------------------------------------------------------------


def _emitter(display: TrainingDisplay) -> Emit:
    def emit(kind: str, row: Row) -> None:
        match kind:
            case "start":
                display.start(row["total_steps"], 0, f"{row['arm']} from {row['depth']} layers")
                display.message(f"{row['parameters']:,} parameters")
            case "total":
                display.plan(row["total_steps"])
            case "replan":
                display.message(f"step {row['step']}: {row['total_steps']:,} steps now; {row['reason']}")
            case "growth":
                display.growth(row)
            case "step" | "train" | "eval" | "stage":
                display.update({"kind": kind, **row})
            case "resume":
                display.message(f"resumed at step {row['step']} with {row['depth']} layers")
            case "skip":
                display.message(
                    f"step {row['step']}: {row['reason']}; back to step {row['back_to_step']}, and on "
                    "without that step's batch"
                )
            case "damaged":
                display.message(
                    f"warning: checkpoint {row['checkpoint']} is damaged ({row['reason']}) and passed over"
                )
            case "warning":
                display.message(f"warning: {row['text']}")
            case "message":
                display.message(row["text"])
            case "probe":
                display.message(f"step {row['step']}: {row['reason']} (probe of {row['seconds']:.1f} s)")
            case "phase":
                display.message(f"step {row['step']}: layers in training: {row['trainable']}")

    return emit


def _describe_data(display: TrainingDisplay, data: PackedData) -> None:
    documents = "" if data.num_documents is None else f"{data.num_documents:,} documents, "
    display.message(
        f"data: {data.source}, {documents}{len(data.train):,} training and "
        f"{len(data.validation):,} validation tokens, vocabulary {data.vocab_size:,}"
    )


def _stayed_small(config: TrainConfig, grown: ArmResult) -> str:
    if config.dry_run:
        return (
            "a dry run: nothing grew; `aiether triggers RUN_DIR` says when each trigger would have grown it"
        )
    advice = " (lower tau_crit and kappa_crit, or train longer)" if config.trigger == "geometric" else ""
    return (
        f"the run ended with {grown.depth} of {final_depth(config)} planned layers: the {config.trigger} "
        f"trigger found no further growth in time; the report shows what it saw{advice}"
    )


# -- the folder ------------------------------------------------------------------------------------------


def _default_output_dir(config: TrainConfig) -> Path:
    """A name that is free; should another process take it too, the folder's lock lets one of them have it."""
    while True:
        now = datetime.now().strftime("%Y-%m-%d-%H%M%S")
        suffix = "".join(random.Random().choices(string.ascii_lowercase, k=3))
        path = Path("runs") / f"{now}-{re.sub(r'[^a-z0-9]+', '-', config.preset)}-{suffix}"
        if not path.exists():
            return path
