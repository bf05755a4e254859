"""What is watched, and what is done about it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from student_trainer.config.base import Section
from student_trainer.config.loss import LossConfig

THRESHOLDS = ("above", "below", "above_lowest", "errors_above_lowest", "below_highest")


class Rule(Section):
    """An alarm: a metric beyond a threshold for so long, and what follows."""

    signal: str
    """A key of metrics.jsonl."""
    above: float | None = None
    """The threshold: this or one of the next four."""
    below: float | None = None
    above_lowest: PositiveFloat | None = None
    """So much above the lowest that the signal has been in this run, as a mean of `for_steps` steps on end."""
    errors_above_lowest: PositiveFloat | None = None
    """Likewise, in standard errors of a mean of `for_steps` steps, and it is their mean that must not pass: the error
    follows from how much the signal has changed from each step to the next in this run."""
    below_highest: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Below this share of the highest that the signal has been, likewise; for signals that are not negative."""
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
        given = [name for name in THRESHOLDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"rule on {self.signal}: {' and '.join(given) or 'no threshold'} given; give one of "
                f"{', '.join(THRESHOLDS)}"
            )
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

    def threshold(self, best: float, error: float) -> float:
        """What the signal must not pass, where `best` is the lowest or highest that it has been; NaN without one.

        Args:
            error: the standard error of a mean of `for_steps` steps.
        """
        if self.errors_above_lowest is not None:
            return best + self.errors_above_lowest * error
        if self.above_lowest is not None:
            return best + self.above_lowest
        if self.below_highest is not None:
            return best * self.below_highest
        threshold = self.above if self.above is not None else self.below
        assert threshold is not None
        return threshold

    @property
    def side(self) -> Literal["above", "below"]:
        """Where the signal is out of bounds."""
        return "below" if self.below is not None or self.below_highest is not None else "above"


HEDGES = ("actually", "alternatively", "but", "hmm", "maybe", "perhaps", "wait")

DEFAULT_RULES = (
    Rule(signal="support_gap", below=-0.05, for_steps=10),
    Rule(signal="reverse_kl", errors_above_lowest=10, for_steps=10),
    Rule(signal="reverse_kl", above_lowest=0.5, for_steps=10, action="stop"),
    Rule(signal="reward", below_highest=0.5, for_steps=10),
    Rule(signal="eval/accuracy_high", below_highest=0.5, for_steps=2, action="stop"),
    Rule(signal="truncation_rate", above=0.5, for_steps=20, from_step=50),
    Rule(signal="repeat_ratio", above=0.5, for_steps=10),
)
"""Two stop the run: what they see is past repair by more steps, a stop undoes nothing, and the same command goes on.
None rolls back, since only the user knows to which rate or loss.

- support_gap, P - Q: where the stop-gradient loss stops it is 0, where the unnormalised one does it is
  -(1 - 1/e) Q = -.63 Q; -.05 is a twelfth of the way. No rule reads the unnormalised loss L: L >= P log(P/Q) >= P - Q
  at every token, so it is never below -.05 before the gap is.
- reverse_kl: it falls or rests under every loss without the bias, at a rate that the student bears; the bias raises it
  from the first step on. The means of W stretches of mere noise lie within some 2 sqrt(2 ln W) standard errors of each
  other, 8.6 for the ten thousand of a hundred thousand steps; 10 leaves room for the error of the error. P - Q moves a
  few steps sooner, but also, by 9.6 errors, in a sound run of SmolLM2, while the reverse KL fell.
- reverse_kl half a nat a token above its lowest: no stable run of the toy world came near.
- reward, and held-out accuracy by the upper end of its 95 % interval, so that a few problems do not sound it: a
  collapse is a fall to half of the peak. Twice on end, so that a run that is evaluated before and after alone goes on.
"""


class WatchConfig(Section):
    """Monitors, alarms, and what a run may survive."""

    rules: tuple[Rule, ...] = DEFAULT_RULES
    """Rules given here take the place of the default ones, DEFAULT_RULES, which warn of student mass leaking out of the
    support, a rising reverse KL, a falling reward, completions that no longer end and endless repeats, and stop the run
    when the reverse KL is half a nat above its lowest or the held-out accuracy has fallen to half."""
    max_roll_backs: Annotated[int, Field(ge=0)] = 2
    """In the whole run; the next one stops it instead."""
    max_skipped_steps: Annotated[int, Field(ge=0)] = 10
    """Optimiser updates in the whole run, a critic's included, that may be skipped because their loss or gradient was
    not finite."""
    full_vocabulary_every: Annotated[int, Field(ge=0)] = 0
    """Steps between exact divergences and entropies over the whole vocabulary; 0 never. Each token brings 4 bytes for
    each id of the vocabulary over the network."""
    full_vocabulary_rollouts: PositiveInt = 4
    """Of each such step, the first ones."""
    hedges: tuple[str, ...] = HEDGES
    """Lower-case words that rise when a student learns to hedge between conflicting privileged teachers."""
