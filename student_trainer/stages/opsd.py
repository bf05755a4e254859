"""On-policy self-distillation by weights that move: a teacher server is sent them before each step.

`live` are the weights of the step; `ema` their running mean (Tarvainen & Valpola 2017, "Mean teachers are better role
models", arXiv:1703.01780, equation 2). The mean is kept here, in float32, and every checkpoint holds it: whatever the
server has, it is sent the whole mean of the step, so that a resumed run, and a server that was started anew, go on with
the same teacher bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from student_trainer.collate import Batch
from student_trainer.distributed import agreed, gather, is_main
from student_trainer.plain_weights import plain_weights
from student_trainer.scoring import Scorer
from student_trainer.stages.base import Collected, Metrics
from student_trainer.stages.opd import Opd
from student_trainer.steady_teacher import WeightsLost
from student_trainer.student import Student

DEFAULT_DECAY = 0.99
"""Of a running mean where the config names none: it is of about the last hundred steps."""

Weights = dict[str, torch.Tensor]


class RunningMean:
    """mean <- d * mean + (1 - d) * weights, in float32 and once a step; the first weights are the first mean.

    Args:
        decay: d, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._step = -1
        self._mean: Weights = {}

    def at(self, step: int, weights: Mapping[str, torch.Tensor]) -> Weights:
        """The mean with the weights of step s in it, once however often it is asked for; in the weights' dtypes."""
        if not self._mean:
            self._mean = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}
        elif step > self._step:
            for name, weight in weights.items():
                self._mean[name].mul_(self._decay).add_(weight.float(), alpha=1 - self._decay)
        self._step = step
        return {name: self._mean[name].to(weight.dtype) for name, weight in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """The mean, and the step whose weights are the last in it."""
        return {"step": self._step, "mean": self._mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._step, self._mean = int(state_dict["step"]), dict(state_dict["mean"])


class Opsd:
    """`Opd` whose teacher is the student itself, of this step or on the average of its steps.

    Args:
        opd: scores by the server that `scorer` reaches, and begins no step before it is asked for.
        student: whose weights rank 0 sends for all.
        mean: None for a teacher that is the student of now; rank 0 alone has it in memory.
    """

    def __init__(self, opd: Opd, scorer: Scorer, student: Student, mean: RunningMean | None) -> None:
        self._opd = opd
        self._scorer = scorer
        self._student = student
        self._mean = mean

    def collect(self, step: int) -> Collected:
        """`Opd.collect` by the teacher of step s; `teacher_version` is what the server calls its weights."""
        started = time.perf_counter()
        version = self._send(step)
        sent_s = time.perf_counter() - started
        collected = agreed(lambda: self._collected(step))
        is_lost = any(gather(collected is None))
        if is_lost or collected is None:
            self._opd.give_up()  # the server takes no weights while it scores by those of before
            version = self._send(step)
            collected = self._opd.collect(step)
        sent = {"teacher_version": float(version), "send_weights_s": sent_s}
        return replace(collected, metrics=collected.metrics | sent)

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """See `Opd.loss`."""
        return self._opd.loss(logits_BTV, batch)

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """See `Opd.watch`."""
        return self._opd.watch(logits_BTV, batch)

    def close(self) -> None:
        """See `Opd.close`."""
        self._opd.close()

    def state_dict(self) -> dict[str, Any]:
        """The mean's; nothing of a teacher that is the student of now."""
        return self._mean.state_dict() if self._mean else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        if self._mean and is_main():
            self._mean.load_state_dict(state_dict)

    def _collected(self, step: int) -> Collected | None:
        """None where the server was started anew since the weights were sent, which the last score tells."""
        try:
            collected = self._opd.collect(step)
            return replace(collected, batch=collected.batch.scored())
        except WeightsLost:
            return None

    def _send(self, step: int) -> int:
        weights = plain_weights(self._student.model, self._student.dtype)
        return self._scorer.send_weights(self._mean.at(step, weights) if self._mean else weights)
