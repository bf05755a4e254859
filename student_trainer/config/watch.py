"""What is watched, and what is done about it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from student_trainer.config.base import Section
from student_trainer.config.loss import LossConfig


class Rule(Section):
    """An alarm: a metric beyond a threshold for so long, and what follows."""

    signal: str
    """A key of metrics.jsonl."""
    above: float | None = None
    """The threshold: this, or `below`."""
    below: float | None = None
    for_steps: PositiveInt = 1
    """In so many steps on end; steps that do not log the signal, or log NaN, do not count."""
    from_step: Annotated[int, Field(ge=0)] = 0
    """Earlier steps do not count: for signals that start far out."""
    action: Literal["warn", "stop", "roll_back"] = "warn"
    """`stop` ends the run with a checkpoint. `roll_back` goes back to the last checkpoint from before the signal left
    its bounds, and on from there with `lr_scale`, `loss` or both."""
    lr_scale: Annotated[float, Field(gt=0, lt=1)] | None = None
    """What `optim.lr` is multiplied by after a roll-back."""
    loss: LossConfig | None = None
    """What is descended after a roll-back."""

    @model_validator(mode="after")
    def _one_threshold(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise ValueError(f"rule on {self.signal}: give one threshold, above or below")
        return self

    @model_validator(mode="after")
    def _roll_back_changes_something(self) -> Self:
        changes = self.lr_scale is not None or self.loss is not None
        if self.action == "roll_back" and not changes:
            raise ValueError(
                f"rule on {self.signal}: roll_back needs lr_scale or loss, or the same steps would end the same way"
            )
        if self.action != "roll_back" and changes:
            raise ValueError(f'rule on {self.signal}: lr_scale and loss are for action = "roll_back"')
        return self

    @property
    def threshold(self) -> float:
        """The one that was given."""
        threshold = self.above if self.above is not None else self.below
        assert threshold is not None
        return threshold

    @property
    def side(self) -> Literal["above", "below"]:
        """Where the signal is out of bounds."""
        return "above" if self.above is not None else "below"


HEDGES = ("actually", "alternatively", "but", "hmm", "maybe", "perhaps", "wait")

DEFAULT_RULES = (
    Rule(signal="support_gap", below=-0.05, for_steps=10),
    Rule(signal="unnormalised_loss", below=-0.05, for_steps=10),
    Rule(signal="truncation_rate", above=0.5, for_steps=20, from_step=50),
    Rule(signal="repeat_ratio", above=0.5, for_steps=10),
)


class WatchConfig(Section):
    """Monitors, alarms, and what a run may survive."""

    rules: tuple[Rule, ...] = DEFAULT_RULES
    """Rules given here take the place of the default ones, which warn of student mass leaking out of the support
    (P - Q and the unnormalised loss), of completions that no longer end, and of endless repeats."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 2
    """In the whole run; the next one stops it instead."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Optimiser updates in the whole run, a critic's included, that may be skipped because their loss or gradient was
    not finite."""
    full_vocabulary_every: Annotated[int, Field(ge=0)] = 0
    """Steps between exact divergences and entropies over the whole vocabulary; 0 never. Each token brings 8 bytes for
    each id of the vocabulary over the network."""
    full_vocabulary_rollouts: PositiveInt = 4
    """Of each such step, the first ones."""
    hedges: tuple[str, ...] = HEDGES
    """Lower-case words that rise when a student learns to hedge between conflicting privileged teachers."""
