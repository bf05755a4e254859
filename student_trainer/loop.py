"""The one loop: data -> loss -> step -> watch -> log -> save. What differs between algorithms is in `stages`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer import checkpoint
from student_trainer.collate import completion_logits
from student_trainer.config import TrainConfig
from student_trainer.evaluate import Evaluation, evaluate
from student_trainer.losses import token_mean
from student_trainer.optim import build_optimizer, build_schedule
from student_trainer.progress import Progress
from student_trainer.rollout.base import Rollout
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.run_folder import Row, RunFolder
from student_trainer.stages import Collected, Stage, build_stage
from student_trainer.student import Student, load_student
from student_trainer.tasks import Task, build_task

NOTHING = -1
"""Before the evaluation that is logged as step 0."""


def train(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Runs, or goes on with, the training run that `config` describes; returns its last checkpoint's folder.

    Raises:
        ConfigError: the run folder, the model or the config is wrong.
        TeacherError, TeacherMismatch: the teacher failed, or cannot score this student.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is intact.
    """
    run = RunFolder(config)
    task = build_task(config.task)
    student = load_student(config.model)
    learner = Learner.build(student, config)
    resumed_from = run.last_checkpoint
    num_done = learner.restore(resumed_from) if resumed_from else 0
    if resumed_from and num_done == config.steps:
        return resumed_from
    run.forget_after(num_done if resumed_from else NOTHING)
    stage = build_stage(config, student, task)
    try:
        with Progress(config, start=num_done, quiet=quiet) as progress:
            if not resumed_from:
                run.log({"step": 0, **_evaluate(student, task, config).metrics()})
            for step in range(num_done, config.steps):
                started = time.perf_counter()
                collected = stage.collect(step)
                row: Row = {"step": step + 1, **collected.metrics, **learner.step(stage, collected)}
                row["step_s"] = time.perf_counter() - started
                if _is_due(step + 1, config.eval.every_steps, config.steps):
                    row |= _evaluate(student, task, config).metrics()
                run.log(row)
                run.log_rollouts(_samples(step + 1, collected.rollouts[: config.rollouts_logged], task))
                if _is_due(step + 1, config.checkpoint.every_steps, config.steps):
                    learner.save(run.checkpoints, step + 1, keep=config.checkpoint.keep)
                progress.advance(row)
    finally:
        stage.close()
    return checkpoint.found(run.checkpoints)[-1]


@dataclass(frozen=True)
class Learner:
    """The student with its optimiser: one optimiser step from one step's data."""

    student: Student
    optimizer: AdamW
    schedule: LambdaLR
    micro_batch_size: int
    max_grad_norm: float

    @classmethod
    def build(cls, student: Student, config: TrainConfig) -> Learner:
        """A fresh optimiser and schedule over all of the student's weights."""
        optimizer = build_optimizer(list(student.model.parameters()), config.optim)
        schedule = build_schedule(optimizer, config.optim, config.steps)
        return cls(student, optimizer, schedule, config.optim.micro_batch_size, config.optim.max_grad_norm)

    def step(self, stage: Stage, collected: Collected) -> Row:
        """Accumulates the step's token mean over micro-batches, clips, and updates the weights once."""
        model, num_tokens = self.student.model, collected.batch.num_tokens
        model.train()
        row: Row = {"loss": 0.0, "num_tokens": num_tokens, "lr": self.schedule.get_last_lr()[0]}
        for micro in collected.batch.split(self.micro_batch_size):
            micro = micro.to(model.device)
            logits_BTV = completion_logits(model, micro)
            loss = token_mean(stage.loss(logits_BTV, micro), micro.mask_BT, num_tokens)
            loss.backward()
            row["loss"] += loss.item()
            for name, value in stage.watch(logits_BTV.detach(), micro).items():
                row[name] = row.get(name, 0.0) + value * micro.num_tokens / num_tokens
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm))
        if not (torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all()):
            raise FloatingPointError(f"loss {row['loss']} and gradient norm {row['grad_norm']} must be finite")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def save(self, folder: Path, num_steps: int, *, keep: int) -> None:
        """See `checkpoint.save`."""
        checkpoint.save(
            folder, num_steps, self.student.model, self.student.tokenizer, self.optimizer, self.schedule, keep=keep
        )

    def restore(self, path: Path) -> int:
        """See `checkpoint.restore`."""
        return checkpoint.restore(path, self.student.model, self.optimizer, self.schedule)


def _is_due(num_steps: int, every_steps: int, last: int) -> bool:
    return num_steps == last or (every_steps > 0 and num_steps % every_steps == 0)


def _evaluate(student: Student, task: Task, config: TrainConfig) -> Evaluation:
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return evaluate(sampler, task, config.eval, max_new_tokens=budget)


def _samples(num_steps: int, rollouts: Sequence[Rollout], task: Task) -> list[Row]:
    return [
        {
            "step": num_steps,
            "problem": rollout.problem.id,
            "prompt": [{"role": m.role, "content": m.content} for m in rollout.problem.messages],
            "text": rollout.text,
            "num_tokens": len(rollout.completion_ids),
            "is_finished": rollout.is_finished,
            "reward": task.reward(rollout.problem, rollout.text),
        }
        for rollout in rollouts
    ]
