"""What a roll-back changes in a run: where it goes on from, and with which learning rate and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from student_trainer.config import LossConfig, TrainConfig


@dataclass(frozen=True)
class RollBack:
    """One roll-back, a line of roll_backs.jsonl.

    Attributes:
        from_step: the step after which the alarm sounded.
        to_step: the checkpoint that the run went on from.
        sentence: the alarm's.
        lr_scale: what the learning rate was multiplied by; None leaves it.
        loss: what is descended from there on, in the config's own tables; None leaves it.
    """

    from_step: int
    to_step: int
    sentence: str
    lr_scale: float | None
    loss: dict[str, Any] | None

    @property
    def num_undone(self) -> int:
        """Steps that were done and undone."""
        return self.from_step - self.to_step

    def row(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def marks(roll_backs: Sequence[RollBack], step: int) -> dict[str, Any]:
    """What a row of metrics says of the roll-backs before it: how many, and on the first row after one, why."""
    if not roll_backs:
        return {}
    event = {"event": f"rolled back: {roll_backs[-1].sentence}"} if step == roll_backs[-1].to_step + 1 else {}
    return {"roll_backs": len(roll_backs), **event}


def adjusted(config: TrainConfig, roll_backs: Sequence[RollBack]) -> TrainConfig:
    """The config that a run goes on with after its roll-backs: rates multiply, the last loss holds."""
    lr = config.optim.lr * math.prod(roll_back.lr_scale or 1.0 for roll_back in roll_backs)
    changes: dict[str, Any] = {"optim": config.optim.model_copy(update={"lr": lr})}
    losses = [roll_back.loss for roll_back in roll_backs if roll_back.loss is not None]
    if losses:
        loss = LossConfig.model_validate(losses[-1])
        changes["stage"] = config.stage.model_copy(update={"loss": loss})
    return config.model_copy(update=changes)
