"""One optimiser step from one step's data, whatever the stage; and the state that a checkpoint keeps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer import checkpoint, distributed
from student_trainer.alarms import SKIPPED
from student_trainer.collate import Batch
from student_trainer.config import TrainConfig
from student_trainer.in_step import micro_batches, num_tokens_of_all
from student_trainer.lm_head import completion_hidden, logit_chunks
from student_trainer.losses import token_mean
from student_trainer.masters import MasterWeights
from student_trainer.optim import build_optimizer, build_schedule, clip_by_global_norm, use_lr
from student_trainer.run_folder import Row
from student_trainer.seeds import DROPOUT, derive_seed
from student_trainer.stages import Collected, Stage
from student_trainer.student import Student


@dataclass(frozen=True)
class Learner:
    """The student with its optimiser: one optimiser step from one step's data."""

    student: Student
    weights: MasterWeights
    optimizer: AdamW
    schedule: LambdaLR
    lr: float
    micro_batch_size: int
    max_grad_norm: float
    seed: int

    @classmethod
    def build(cls, student: Student, config: TrainConfig) -> Learner:
        """A fresh optimiser and schedule over the student's weights that are trained."""
        weights = MasterWeights(student.model)
        optimizer = build_optimizer(list(weights.named.values()), config.optim)
        schedule = build_schedule(optimizer, config.optim, config.steps)
        optim = config.optim
        return cls(
            student, weights, optimizer, schedule, optim.lr, optim.micro_batch_size, optim.max_grad_norm, config.seed
        )

    def step(self, stage: Stage, collected: Collected) -> Row:
        """One update for each of the step's batches; loss, gradient norm and monitors are their means over the updates.

        Without an update nothing changes: warm-up and decay wait for the next step that learns. A step without a batch
        has no loss in its row.

        Raises:
            TeacherError, TeacherGone, TeacherMismatch: see `Batch.scored`; the weights are those before the update.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        # Dropout draws from torch's global state: of this step and rank, whatever came before.
        draw = self.schedule.last_epoch * distributed.world_size() + distributed.rank()
        torch.manual_seed(derive_seed(self.seed, DROPOUT, draw))
        rows = [self._update(stage, batch) for batch in collected.updates()]
        row: Row = {name: sum(each[name] for each in rows) / len(rows) for name in rows[0]} if rows else {}
        totals = {name: sum(each[name] for each in rows) for name in (SKIPPED, "watch_s", "num_tokens")}
        if totals[SKIPPED] < len(rows):
            self.schedule.step()
        totals["num_tokens"] //= collected.num_epochs
        return {"lr": lr, "num_updates": len(rows), **row, **totals}

    def _update(self, stage: Stage, batch: Batch) -> Row:
        """Accumulates the batch's token mean over micro-batches and ranks, clips, and updates the weights once.

        An update whose loss or gradient is not finite is skipped: weights and optimiser stay as they were.
        """
        model, num_tokens = self.student.model, num_tokens_of_all(batch)
        model.train()
        row: Row = {"loss": 0.0}
        watch_s = 0.0
        for micro in micro_batches(batch, self.micro_batch_size, model.device):
            # A teacher may still be at its scores: the student reads the sequences meanwhile.
            hidden_ND = completion_hidden(model, micro)
            scored = distributed.agreed(micro.scored)
            for logits_BTV, tokens in logit_chunks(model, self.student.head, hidden_ND, scored):
                loss = token_mean(stage.loss(logits_BTV, tokens), tokens.mask_BT, num_tokens)
                loss.backward()
                row["loss"] += loss.item()
                started = time.perf_counter()
                for name, value in stage.watch(logits_BTV.detach(), tokens).items():
                    row[name] = row.get(name, 0.0) + value * tokens.num_tokens / num_tokens
                watch_s += time.perf_counter() - started
                # Or this chunk's logits would live beside the next one's.
                del logits_BTV, loss
        row = distributed.sums(row)
        row["watch_s"] = watch_s
        row["num_tokens"] = num_tokens
        row["grad_norm"] = clip_by_global_norm(self.weights.named.values(), self.max_grad_norm)
        is_finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        row[SKIPPED] = int(not is_finite)
        if is_finite:
            self.optimizer.step()
            self.weights.publish()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def save(self, folder: Path, num_steps: int, stage: Stage, *, keep: int) -> None:
        """See `checkpoint.save`."""
        weights = self.weights.named
        checkpoint.save(folder, num_steps, self.student, weights, self.optimizer, self.schedule, stage, keep=keep)

    def restore(self, path: Path) -> int:
        """See `checkpoint.restore`; the learning rate is the config's, whichever the checkpoint was written with."""
        num_steps = checkpoint.restore(path, self.weights.named, self.optimizer, self.schedule)
        self.weights.publish()
        use_lr(self.schedule, self.lr)
        return num_steps
