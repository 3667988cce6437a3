"""Every setting of a run in groups, each with its line of help: what `--help` and docs/interface.md show."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any

import tyro

from aiether.training.config import TrainConfig, setting_types

GROUPS: dict[str, dict[str, str]] = {
    "data": {
        "dataset_path": "One source or several: a file (text, .jsonl, .csv, .tsv, .parquet, compressed or "
        "not), folder, glob, save_to_disk folder, .bin of tokens or hub:NAME[:CONFIG][:SPLIT]. "
        "None: the source of Python's standard library.",
        "dataset_weights": "Shares of the training tokens, one a source. None: by size.",
        "text_column": "Column that holds the text, where a source has columns.",
        "token_dtype": "Type of the ids in a .bin file. None: as the file beside it says, else uint16.",
        "tokenizer": "A tokenizer.json file, tokenizer folder (Hugging Face's or GPT-2's encoder.json and "
        "vocab.bpe) or name on the Hub. None: a byte-level BPE is trained.",
        "vocab_size": "Entries of the tokenizer that is trained.",
        "validation_fraction": "Share of the text held out, in whole documents.",
        "cache_dir": "Where prepared tokens are kept. None: ~/.cache/aiether.",
    },
    "model": {
        "arch": "transformers' GPT-2, Llama or Phi, or LAHR: a Llama with adaptive depth.",
        "size": "A shape by name: layers, heads, width and context, where these are not given; no growth.",
        "n_layer": "Layers at the start.",
        "n_head": "Attention heads.",
        "n_embd": "Embedding width; a multiple of n_head.",
        "context_length": "Tokens per training window.",
        "dropout": "Dropout rate.",
    },
    "training": {
        "num_epochs": "Passes over the training tokens, where none of the next four gives the length.",
        "max_steps": "The run's length in optimizer steps. One of these four is given at most.",
        "max_tokens": "Its length in training tokens.",
        "max_flops": "Its length in training FLOPs, as in 1e15, head and attention included.",
        "max_seconds": "Its length in seconds of training: evaluating, saving, growing and compiling do not "
        "count.",
        "batch_size": "Windows per forward pass.",
        "gradient_accumulation_steps": "Forward passes per optimizer step.",
        "lr": "Peak learning rate.",
        "lr_warmup_steps": "Steps of linear warm-up.",
        "schedule": "Learning rate after the warm-up: constant then linear decay (wsd), cosine or linear.",
        "decay_fraction": "Share of the steps over which wsd decays.",
        "optimizer": "AdamW, or Muon on the matrices of the blocks and AdamW on the rest.",
        "weight_decay": "Decay of matrices; vectors do not decay.",
        "adam_beta1": "AdamW's first decay rate.",
        "adam_beta2": "AdamW's second decay rate.",
        "max_grad_norm": "Gradients are clipped to this norm.",
        "seed": "Seeds the weights, the data order, dropout and growth.",
        "device": "auto takes CUDA, then MPS, then the CPU.",
        "bf16": "Mixed precision in bfloat16.",
        "compile": "Compile block by block.",
        "cuda_graphs": "With compile, on CUDA, without accumulation: replay each block as a CUDA graph.",
        "baseline": "static: afterwards train the final depth from the start, for the same FLOPs.",
    },
    "records": {
        "output_dir": "The run folder. None: a new folder under runs/.",
        "eval_interval_steps": "Steps between evaluations. None: collect_interval_steps.",
        "eval_batches": "Validation batches per evaluation.",
        "log_interval_steps": "Steps between lines of the training log.",
        "save_interval_steps": "Steps between checkpoints. None: a tenth of the run.",
        "keep_checkpoints": "Checkpoints that are kept.",
        "on_nan": "When the loss or the gradients become infinite or NaN: stop, or go back to the last "
        "checkpoint and skip that step's batch.",
        "max_skipped_steps": "How many steps on_nan=skip may skip before the run stops.",
        "sample_prompt": "What the model continues at the end of each stage, for the report.",
        "report_to": "Trackers that are told every row, one or several; each an extra: aiether[wandb].",
        "tracking_project": "The project that W&B and trackio file the run under.",
    },
    "stagnation": {
        "trigger": "What decides that the model grows.",
        "thresholds": "Compare tau_crit and kappa_crit with raw values, or with normalised ones "
        "(0 straight line, 1 random walk, whatever the window).",
        "tau_crit": "Temporal stretch from which the trajectory counts as stagnant.",
        "kappa_crit": "Effective curvature from which the trajectory counts as stagnant.",
        "watch": "Measure the frontier layer, or all layers together.",
        "pg_patience": "Consecutive stagnant evaluations before growth.",
        "pg_threshold": "Grow only if the best validation loss improved by less than this, relatively, "
        "over the last pg_patience evaluations.",
        "warmup_steps": "Steps before the first stagnation check.",
        "history_window_size": "Snapshots in the trajectory.",
        "collect_interval_steps": "Steps between snapshots.",
        "deadline_fractions": "Triggers geometric and plateau: fractions of the steps at which the model "
        "grows at the latest.",
        "growth_fractions": "Trigger fixed: the fractions of the steps at which the model grows.",
        "latest_growth": "No growth after this fraction of the steps.",
        "lag_interval": "Trigger lag: evaluations between two probes.",
        "lag_steps": "Steps that each grown fork of a probe trains; the one that stays gets as many FLOPs.",
        "lag_candidates": "What a probe tries, as in stack/copy interleave/zero. None: trigger lag tries "
        "placement/init, other triggers nothing. Named, they decide the form of other triggers' growths.",
        "dry_run": "Measure and decide, and never grow; `aiether triggers` then says when each trigger "
        "would have.",
        "snapshot_storage": "Where snapshots are kept: on the device, in host memory or on disk.",
    },
    "growth": {
        "placement": "Where new layers go: the whole stack again, each beside its source, on top, "
        "or below the lowest layer (front).",
        "grow_by": "Layers per growth; double doubles, max grows to the end at once.",
        "grow_to": "Depths to grow to, in order; wins over grow_by.",
        "max_layers": "The planned final depth. None: the last of grow_to, else twice n_layer.",
        "init": "How new layers start: extrapolated from the trajectory, copied, copied with zero output, "
        "random, or copied with noise.",
        "noise": "Initialiser noise: its norm relative to the copied tensor's.",
        "lr_policy": "Learning rate after a growth: goes on, re-warms (new tensors or all), or starts again.",
        "rewarm_steps": "Optimizer steps of a re-warm.",
        "moments": "Optimizer moments of new tensors: zero, copied from the source; reset drops all.",
        "protocol": "report: freeze, warm the new layers up alone, unfreeze, restart the schedule. "
        "none: go on.",
        "isolated_warmup_steps": "Protocol report: steps in which only the new layers train.",
        "isolated_lr_scale": "Protocol report: the learning rate of those steps, relative.",
        "unfreeze": "Protocol report: all old layers at once, or from the new ones outwards.",
        "unfreeze_interval_steps": "Gradual unfreezing: steps between layers.",
    },
    "adaptive depth": {
        "lahr_condition": "Architecture lahr: which of its three parts the model has.",
        "lahr_mod": "Whether it has Mixture-of-Depths layers. None: as the condition says.",
        "lahr_latent": "Whether it has a latent block that iterates. None: as the condition says.",
        "lahr_memory": "Whether it has a product-key memory. None: as the condition says.",
        "lahr_every": "The last of each so many layers is routed.",
        "lahr_capacity": "Share of the tokens that a routed layer processes.",
        "lahr_router": "The k best tokens of a sequence (generation goes by a predictor), all above a "
        "threshold (causal in training too), or a control: random tokens, every n-th token.",
        "lahr_predictor": "Router topk: the router's own score or a second head says who is among the k.",
        "lahr_slack": "While generating a routed layer takes at most capacity times this of the tokens.",
        "lahr_burst": "And so many more.",
        "lahr_iterations": "Latent iterations that a token gets at most.",
        "lahr_halting": "Learned; or a control: all iterations, a random number, until little changes.",
        "lahr_halt_q": "A token stops once it has stopped with this probability: 0 at once, 1 never early.",
        "lahr_prior": "The number of iterations that halting is drawn towards.",
        "lahr_kl_weight": "How strongly.",
        "lahr_memory_keys": "Half keys: the memory has their square in slots.",
        "lahr_memory_heads": "Queries of a token.",
        "lahr_memory_top_k": "Slots that a query reads.",
        "lahr_memory_at": "Where the memory is read: 0 at the input, 0.5 after half of the layers.",
        "lahr_memory_lr": "Learning rate of the memory's slots, times lr.",
        "lahr_positions": "Rotary or learned positions.",
    },
    "extrapolation": {
        "beta0": "Base gain of the velocity term.",
        "gamma0": "Base gain of the curvature correction.",
        "eta0": "Base gain of the escape term.",
        "k_subspace": "Dimension of the dynamic subspace; auto reads it off the spectrum.",
        "ell_orth": "Secondary modes in the escape direction.",
        "scale": "Terms of unit length, or as long as the trajectory's displacement.",
        "center": "Centre the velocities before the decomposition.",
        "escape": "Escape along the secondary modes, or along the velocity outside the subspace.",
    },
}
"""Group -> setting -> help. `preset` is a flag of its own, beside `config` and `resume`."""

ABOUT = {
    "data": "What is read, and how it becomes tokens.",
    "model": "The model at the start.",
    "training": "How it is trained.",
    "records": "What is written, and how often.",
    "stagnation": "When the model grows.",
    "growth": "Where new layers go, how they start, and what happens right after.",
    "adaptive depth": "Which tokens go through which layers, how long each is thought about (--arch lahr).",
    "extrapolation": "The geometric initialiser.",
}


def flag_name(name: str) -> str:
    """A setting as a flag without its dashes: a family's settings carry its name and a dot."""
    return name.replace("lahr_", "lahr.", 1) if name.startswith("lahr_") else name


def settings_dataclass(defaults: TrainConfig, extra: type) -> type[Any]:
    """A dataclass for tyro: `extra`'s fields as the group `run`, then one nested dataclass per group."""
    types = setting_types()
    members: list[Any] = [("run", extra, field(default_factory=extra))]
    for group, helps in GROUPS.items():
        settings = [
            (
                name,
                Annotated[types[name], tyro.conf.arg(name=flag_name(name), help=text)],
                getattr(defaults, name),
            )
            for name, text in helps.items()
        ]
        cls = make_dataclass(
            group.replace(" ", "_"), settings, frozen=True, kw_only=True, namespace={"__doc__": ABOUT[group]}
        )
        members.append((cls.__name__, cls, field(default_factory=cls)))
    return make_dataclass("TrainFlags", members, frozen=True, kw_only=True)


def values_of(flags: Any) -> dict[str, Any]:
    """Every setting's value in parsed flags, flat."""
    return {
        setting.name: getattr(getattr(flags, group.replace(" ", "_")), setting.name)
        for group in GROUPS
        for setting in fields(getattr(flags, group.replace(" ", "_")))
    }
