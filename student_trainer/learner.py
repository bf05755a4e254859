"""One optimiser step from one step's data, whatever the stage; and the state that a checkpoint keeps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer import checkpoint
from student_trainer.alarms import SKIPPED
from student_trainer.collate import completion_logits
from student_trainer.config import TrainConfig
from student_trainer.losses import token_mean
from student_trainer.optim import build_optimizer, build_schedule, use_lr
from student_trainer.run_folder import Row
from student_trainer.stages import Collected, Stage
from student_trainer.student import Student


@dataclass(frozen=True)
class Learner:
    """The student with its optimiser: one optimiser step from one step's data."""

    student: Student
    optimizer: AdamW
    schedule: LambdaLR
    lr: float
    micro_batch_size: int
    max_grad_norm: float

    @classmethod
    def build(cls, student: Student, config: TrainConfig) -> Learner:
        """A fresh optimiser and schedule over all of the student's weights."""
        optimizer = build_optimizer(list(student.model.parameters()), config.optim)
        schedule = build_schedule(optimizer, config.optim, config.steps)
        optim = config.optim
        return cls(student, optimizer, schedule, optim.lr, optim.micro_batch_size, optim.max_grad_norm)

    def step(self, stage: Stage, collected: Collected) -> Row:
        """Accumulates the step's token mean over micro-batches, clips, and updates the weights once.

        A step whose loss or gradient is not finite is skipped: weights, optimiser and schedule stay as they were.
        """
        model, num_tokens = self.student.model, collected.batch.num_tokens
        model.train()
        row: Row = {"loss": 0.0, "num_tokens": num_tokens, "lr": self.optimizer.param_groups[0]["lr"], "watch_s": 0.0}
        for micro in collected.batch.split(self.micro_batch_size):
            micro = micro.to(model.device)
            logits_BTV = completion_logits(model, micro)
            loss = token_mean(stage.loss(logits_BTV, micro), micro.mask_BT, num_tokens)
            loss.backward()
            row["loss"] += loss.item()
            started = time.perf_counter()
            for name, value in stage.watch(logits_BTV.detach(), micro).items():
                row[name] = row.get(name, 0.0) + value * micro.num_tokens / num_tokens
            row["watch_s"] += time.perf_counter() - started
        row["grad_norm"] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm))
        is_finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        row[SKIPPED] = int(not is_finite)
        if is_finite:
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
        """See `checkpoint.restore`; the learning rate is the config's, whichever the checkpoint was written with."""
        num_steps = checkpoint.restore(path, self.student.model, self.optimizer, self.schedule)
        use_lr(self.schedule, self.lr)
        return num_steps
