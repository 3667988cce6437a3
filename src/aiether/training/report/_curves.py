"""What the curves of a report show: which column over which, and the words around them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """What one figure shows: column `y` of `table` over column `x`, for the run and its baselines.

    `noisy`: smoothed, raw values faintly below. `from_zero`: y begins at 0. `whole`: spikes are not cut off.
    """

    key: str
    title: str
    caption: str
    table: str
    y: str
    y_label: str
    x: str = "step"
    x_label: str = "step"
    noisy: bool = False
    from_zero: bool = False
    whole: bool = False


def _loss(key: str, title: str, x: str, x_label: str, caption: str) -> Curve:
    label = "evaluation loss, nats per token"
    return Curve(key, title, caption, "evals", "eval_loss", label, x=x, x_label=x_label)


AGAINST_STEPS = _loss(
    "loss-steps",
    "Loss against steps",
    "step",
    "step",
    "A step costs more the deeper the model.",
)
AGAINST_TOKENS = _loss(
    "loss-tokens",
    "Loss against tokens",
    "tokens",
    "training tokens",
    "What was read to get there, whatever the model's size.",
)
AGAINST_COMPUTE = _loss(
    "loss-compute",
    "Loss against compute",
    "flops",
    "training FLOPs",
    "Evaluation loss over the FLOPs spent so far, output head and attention included. Lower and further left "
    "is better.",
)
AGAINST_TIME = _loss(
    "loss-time",
    "Loss against time",
    "elapsed_s",
    "training time",
    "Evaluation and saving are left out; other load on the machine is not.",
)

CURVES: dict[str, tuple[Curve, ...]] = {
    "loss": (
        AGAINST_STEPS,
        AGAINST_TOKENS,
        AGAINST_TIME,
        Curve(
            "train-loss",
            "Training loss",
            "Every logged step faintly, their running mean on top.",
            "train",
            "loss",
            "nats per token",
            noisy=True,
        ),
    ),
    "speed": (
        Curve(
            "train-speed",
            "Training steps per second",
            "A shallower model takes its steps faster; each growth costs speed.",
            "train",
            "steps_per_s",
            "steps per second",
            noisy=True,
            from_zero=True,
        ),
        Curve(
            "eval-speed",
            "Evaluation steps per second",
            "The same for the forward pass alone.",
            "evals",
            "eval_steps_per_s",
            "steps per second",
            from_zero=True,
        ),
        Curve(
            "gradient-norm",
            "Gradient norm",
            "Before clipping. A growth that shocks the model shows here first.",
            "train",
            "grad_norm",
            "norm",
            noisy=True,
            whole=True,
        ),
        Curve(
            "learning-rate",
            "Learning rate",
            "As the schedule set it; a growth protocol may restart it.",
            "train",
            "learning_rate",
            "learning rate",
            from_zero=True,
            whole=True,
        ),
    ),
}
