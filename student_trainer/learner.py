"""One optimiser step from one step's data, whatever the stage; and the state that a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer import checkpoint, distributed
from student_trainer.collate import Batch, completion_logits
from student_trainer.config import ConfigError, TrainConfig
from student_trainer.losses import token_mean
from student_trainer.masters import MasterWeights
from student_trainer.optim import build_optimizer, build_schedule, clip_by_global_norm
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
    micro_batch_size: int
    max_grad_norm: float
    seed: int

    @classmethod
    def build(cls, student: Student, config: TrainConfig) -> Learner:
        """A fresh optimiser and schedule over the student's weights that are trained.

        Raises:
            ConfigError: a step has fewer problems than there are processes.
        """
        num_ranks = distributed.world_size()
        if config.problems_per_step < num_ranks:
            raise ConfigError(
                f"problems_per_step is {config.problems_per_step}, fewer than the {num_ranks} processes: raise it, or "
                "start fewer"
            )
        weights = MasterWeights(student.model)
        optimizer = build_optimizer(list(weights.named.values()), config.optim)
        optimizer.register_step_post_hook(lambda *_: weights.publish())
        schedule = build_schedule(optimizer, config.optim, config.steps)
        optim = config.optim
        return cls(student, weights, optimizer, schedule, optim.micro_batch_size, optim.max_grad_norm, config.seed)

    def step(self, stage: Stage, collected: Collected) -> Row:
        """Accumulates the step's token mean over micro-batches and ranks, clips, and updates the weights once."""
        model = self.student.model
        num_tokens = int(distributed.sums({"tokens": collected.batch.num_tokens})["tokens"])
        model.train()
        # Dropout draws from torch's global state: of this update and rank, whatever came before.
        update = self.schedule.last_epoch * distributed.world_size() + distributed.rank()
        torch.manual_seed(derive_seed(self.seed, DROPOUT, update))
        sums: Row = {"loss": 0.0}
        for micro in _in_step(list(collected.batch.split(self.micro_batch_size))):
            micro = micro.to(model.device)
            logits_BTV = completion_logits(model, micro)
            loss = token_mean(stage.loss(logits_BTV, micro), micro.mask_BT, num_tokens)
            loss.backward()
            if not micro.num_tokens:
                continue
            sums["loss"] += loss.item()
            for name, value in stage.watch(logits_BTV.detach(), micro).items():
                sums[name] = sums.get(name, 0.0) + value * micro.num_tokens / num_tokens
        row: Row = {**distributed.sums(sums), "num_tokens": num_tokens, "lr": self.schedule.get_last_lr()[0]}
        row["grad_norm"] = clip_by_global_norm(self.weights.named.values(), self.max_grad_norm)
        if not (torch.tensor([row["loss"], row["grad_norm"]]).isfinite().all()):
            raise FloatingPointError(f"loss {row['loss']} and gradient norm {row['grad_norm']} must be finite")
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def save(self, folder: Path, num_steps: int, *, keep: int) -> None:
        """See `checkpoint.save`."""
        checkpoint.save(folder, num_steps, self.student, self.weights.named, self.optimizer, self.schedule, keep=keep)

    def restore(self, path: Path) -> int:
        """See `checkpoint.restore`."""
        num_steps = checkpoint.restore(path, self.weights.named, self.optimizer, self.schedule)
        self.weights.publish()
        return num_steps


def _in_step(micros: list[Batch]) -> list[Batch]:
    """As many micro-batches as the rank with the most has: sharded weights are gathered by all ranks at once."""
    return micros + [micros[0].idle()] * (max(distributed.gather(len(micros))) - len(micros))
