"""Which plots a report has, in which groups, and what each one means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from student_trainer.config import LossConfig, StageConfig, TrainConfig
from student_trainer.report.deciles import PREFIX as DECILE
from student_trainer.report.draw import Curve, Draw, draw_lines, draw_smoothed, draw_stack
from student_trainer.report.headline import TIMES
from student_trainer.report.record import RunRecord
from student_trainer.report.series import series_of
from student_trainer.run_folder import Row

UNPLOTTED = {"step", "num_tokens", "step_s", "eval/accuracy_low", "eval/accuracy_high", "eval/truncation_rate"}
"""The axis, what the headline sums up, the accuracy's band, and a figure that is left to metrics.jsonl."""

_FILE_NAME = re.compile(r"\W+")


@dataclass(frozen=True)
class Panel:
    """One plot: `name` is its file's, `unit` the axis's, `metrics` the curves' labels by their key in metrics.jsonl."""

    name: str
    title: str
    unit: str
    metrics: dict[str, str]
    caption: str
    draw: Draw = draw_smoothed

    def curves(self, record: RunRecord) -> list[Curve]:
        """The curves that the run logged."""
        curves = [_curve(record.rows, key, label) for key, label in self.metrics.items()]
        return [curve for curve in curves if len(curve.series)]


def panels(config: TrainConfig) -> dict[str, list[Panel]]:
    """Every panel by its group's title; which of them have data is the run's to say."""
    return {
        "Learning": _learning(config),
        "Agreement with the teacher": _agreement(config.stage),
        "Health": _health(config),
        "Text": _text(config),
        "Time": TIME,
    }


def other_panels(record: RunRecord) -> list[Panel]:
    """A panel for every metric that no other panel shows, under its own name."""
    shown = {key for group in panels(record.config).values() for panel in group for key in panel.metrics}
    logged = {key for row in record.rows for key, value in row.items() if isinstance(value, int | float)}
    left = sorted(key for key in logged - shown - UNPLOTTED if not key.startswith(DECILE))
    return [Panel(_FILE_NAME.sub("_", key), key, "value", {key: key}, "") for key in left]


def describe(title: str, curves: Sequence[Curve]) -> str:
    """The plot in words, for those who do not see it."""
    return f"{title} by step. " + " ".join(f"{curve.label}: {_course(curve)}." for curve in curves)


def gaps(curves: Sequence[Curve]) -> str:
    """Says how many values a plot cannot show; "" when it shows all."""
    return " ".join(
        f"{curve.label}: {curve.series.num_not_finite} of {len(curve.series)} values are not finite and leave gaps."
        for curve in curves
        if curve.series.num_not_finite
    )


def _curve(rows: Sequence[Row], key: str, label: str) -> Curve:
    low, high = series_of(rows, f"{key}_low"), series_of(rows, f"{key}_high")
    return Curve(label, series_of(rows, key), (low, high) if len(low) else None)


def _course(curve: Curve) -> str:
    steps, values = curve.series.steps, curve.series.values
    if len(values) == 1:
        return f"{values[0]:.3g} at step {steps[0]}"
    ends = f"{values[0]:.3g} at step {steps[0]}, {values[-1]:.3g} at step {steps[-1]}"
    finite = values[np.isfinite(values)]
    return f"{ends}, between {finite.min():.3g} and {finite.max():.3g}" if len(finite) else ends


def _learning(config: TrainConfig) -> list[Panel]:
    return [
        Panel("loss", "Loss", "loss value", {"loss": "loss"}, _loss_caption(config.stage)),
        Panel(
            "reverse_kl",
            "Reverse KL",
            "nats a token",
            {"reverse_kl": "reverse KL"},
            "Mean of log p − log q over the sampled tokens (p student, q teacher): an estimate of KL(p ‖ q), whatever "
            "the loss. Single steps may be negative.",
        ),
        Panel(
            "accuracy",
            "Held-out accuracy",
            "share of problems",
            {"eval/accuracy": "accuracy", "eval/well_formed": "well formed"},
            f"Greedy answers to {config.eval.num_problems} problems never trained on. The band is Wilson's 95 % "
            "interval; well formed answers could be read, right or wrong.",
            draw_lines,
        ),
        Panel(
            "reward",
            "Reward of the rollouts",
            "mean reward",
            {"reward": "reward"},
            f"Of what the student wrote at temperature {config.rollout.temperature:g}; watched, not learnt from, "
            "in distillation.",
        ),
        Panel(
            "token_accuracy",
            "Token accuracy",
            "share of tokens",
            {"token_accuracy": "token accuracy"},
            "Reference tokens that the student ranks first.",
        ),
    ]


def _loss_caption(stage: StageConfig) -> str:
    loss = _loss_of(stage)
    match loss.kind if loss else stage.kind:
        case "sft":
            return "Negative log-likelihood of the references, nats a token."
        case "grpo" | "ppo":
            return (
                "Clipped surrogate: its gradient is what counts. Its value says little; progress is read from the "
                "reward."
            )
        case "stop_gradient_reverse_kl":
            return (
                "Stop-gradient reverse KL: the value is not a divergence. It can be negative, and a falling curve "
                "is not the goal; agreement is read from the reverse KL."
            )
        case "reverse_kl":
            return "KL(p ‖ q) over the whole vocabulary (p student, q teacher), nats a token."
        case "forward_kl":
            return "KL(q ‖ p) over the whole vocabulary (p student, q teacher), nats a token."
        case kind:
            return f"The value that {kind} descends; agreement is read from the reverse KL, not from it."


def _loss_of(stage: StageConfig) -> LossConfig | None:
    """The distillation loss; None for a stage that has none."""
    loss = getattr(stage, "loss", None)
    return loss if isinstance(loss, LossConfig) else None


def _agreement(stage: StageConfig) -> list[Panel]:
    loss = _loss_of(stage)
    if loss is None:
        return []
    return [
        Panel(
            "overlap",
            "Overlap of the top-K lists",
            "share of K",
            {"overlap_ratio": "overlap"},
            f"Ids that both models rank among their first {loss.top_k}, mean over tokens.",
        ),
        Panel(
            "support_mass",
            "Mass on the support",
            "probability",
            {"support_student_mass": "P, student", "support_teacher_mass": "Q, teacher"},
            f"On the ids that a truncated loss runs over ({loss.support} top-K). P falling while Q stays is "
            "student mass leaking out of the support.",
        ),
        Panel(
            "overlap_mass",
            "Mass on the shared ids",
            "probability",
            {"overlap_student_mass": "student", "overlap_teacher_mass": "teacher"},
            "On the ids that are in both top-K lists.",
        ),
    ]


def _health(config: TrainConfig) -> list[Panel]:
    return [
        Panel(
            "entropy",
            "Entropy of the student",
            "nats",
            {"entropy": "entropy"},
            f"Mean over the student's own tokens at temperature {config.rollout.temperature:g}.",
        ),
        Panel(
            "grad_norm",
            "Gradient norm",
            "norm",
            {"grad_norm": "gradient norm"},
            f"Before clipping at {config.optim.max_grad_norm:g}.",
        ),
        Panel("lr", "Learning rate", "rate", {"lr": "rate"}, "Warm-up, then cosine decay.", draw_lines),
    ]


def _text(config: TrainConfig) -> list[Panel]:
    return [
        Panel(
            "length",
            "Completion length",
            "tokens",
            {"length_mean": "mean", "length_p95": "95th percentile"},
            f"The budget is {config.rollout.max_new_tokens} tokens.",
        ),
        Panel(
            "truncation",
            "Truncated completions",
            "share of completions",
            {"truncation_rate": "truncated"},
            "Cut at the budget, without an end of text.",
        ),
        Panel(
            "hedges",
            "Hedge words",
            "per token",
            {"hedge_frequency": "hedges"},
            "“wait”, “but”, “maybe” and the like: they rise when a student learns to waver.",
        ),
        Panel(
            "repeats",
            "Repeats",
            "share of tokens",
            {"repeat_ratio": "repeats"},
            "Tokens whose trailing 3-gram was already written in the same completion.",
        ),
    ]


TIME = [
    Panel(
        "seconds",
        "Seconds a step",
        "seconds",
        {key: name for name, key in TIMES},
        "Stacked: rollouts by the student, scores by the teacher, and learning (forward, backward, update).",
        draw_stack,
    ),
    Panel(
        "scored_tokens",
        "Scoring speed",
        "tokens a second",
        {"scored_tokens_per_s": "scored tokens"},
        "Completion tokens that the teacher scored, by the trainer's clock.",
    ),
]
