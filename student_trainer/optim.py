"""The optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from student_trainer.config import OptimConfig
from student_trainer.distributed import whole


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); weight decay on matrices only."""
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([group for group in groups if group["params"]], lr=config.lr, betas=config.betas)


def build_schedule(optimizer: AdamW, config: OptimConfig, num_steps: int) -> LambdaLR:
    """The learning rate of step s (from 0): see `lr_share`."""
    return LambdaLR(optimizer, lambda step: lr_share(step, num_steps, config))


def use_lr(schedule: LambdaLR, lr: float) -> None:
    """Makes `lr` the rate that the schedule takes its shares of, from the next step on."""
    schedule.base_lrs = [lr for _ in schedule.base_lrs]
    for group, share in zip(schedule.optimizer.param_groups, schedule.lr_lambdas, strict=True):
        group["initial_lr"] = lr
        group["lr"] = lr * share(schedule.last_epoch)


def lr_share(step: int, num_steps: int, config: OptimConfig) -> float:
    """Share of `config.lr` at step s of S, from 0: (s + 1) / W over W warm-up steps, then cosine to the final share."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - 1 - config.warmup_steps)
    return config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def clip_by_global_norm(weights: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scales the gradients, of every rank together, to a Euclidean norm of at most `max_norm`; returns their norm
    before that."""
    return float(whole(torch.nn.utils.clip_grad_norm_(weights, max_norm)))
