"""Learning from the task's own rewards, without a teacher."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from student_trainer.config.base import Section


class PolicyStage(Section):
    """What every stage has that learns from rewards."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """A token is pushed down until its probability is 1 - clip_low of what it was sampled with (PPO's epsilon)."""
    clip_high: PositiveFloat = 0.2
    """A token is pushed up until its probability is 1 + clip_high of what it was sampled with."""
    kl_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Of the divergence from the model in `model.path`, of which a frozen copy is held in memory; 0 holds none."""
    truncated: Literal["mask", "punish"] = "mask"
    """What becomes of a completion cut at the budget: `mask` leaves it out of the loss, since its end is unknown
    (DAPO's overlong filtering); `punish` gives it reward 0, whatever it says, and learns from it."""
    num_minibatches: PositiveInt = 1
    """Parts of a step's completions, with one optimiser update each."""
    num_epochs: PositiveInt = 1
    """Passes over a step's completions. With one update in all, nothing is ever clipped."""


class GrpoStage(PolicyStage):
    """Group-relative policy optimisation (arXiv:2402.03300): a group is one problem's `rollout.samples_per_problem`."""

    kind: Literal["grpo"]
    clip_high: PositiveFloat = 0.28
    """As in `ppo`, and wider than clip_low, so that rare tokens can rise: DAPO's clip-higher (arXiv:2503.14476)."""
    divide_by_std: bool = True
    """Whether advantages are divided by the standard deviation of their group; not in Dr. GRPO (arXiv:2503.20783)."""
    drop_equal_groups: bool = True
    """Whether groups with equal rewards, whose advantages are 0, are left out of the step and of its token mean (DAPO's
    dynamic sampling). A step whose groups are all equal changes nothing."""
    max_draws: PositiveInt = 4
    """How often a step draws problems at most: after its own, as many more as equal groups were left out, until
    `problems_per_step` groups differ (DAPO, which sets no limit); 1 puts nothing in their place."""


class PpoStage(PolicyStage):
    """Proximal policy optimisation (arXiv:1707.06347), with a critic that starts as a copy of the student."""

    kind: Literal["ppo"]
    num_epochs: PositiveInt = 4
    """Passes over a step's completions, of the student and of the critic."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a later token's reward."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Of generalised advantage estimation: 1 trusts the rewards alone, 0 the critic alone."""
    value_clip: PositiveFloat = 0.2
    """How far one step moves a value before its loss is cut, in rewards."""
    critic_lr: PositiveFloat = 1e-5
    """Of the critic's AdamW, constant; what else it needs is in `optim`."""
