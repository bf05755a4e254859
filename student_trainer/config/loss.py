"""What distillation descends, and the traps that are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from student_trainer.config.base import Section

LossKind = Literal[
    "stop_gradient_reverse_kl",
    "tail_reverse_kl",
    "renormalised_reverse_kl",
    "biased_reverse_kl",
    "tail_forward_kl",
    "renormalised_forward_kl",
    "reverse_kl",
    "forward_kl",
    "jsd",
    "policy_gradient",
    "k2",
    "k3",
]

FULL_VOCABULARY = frozenset({"reverse_kl", "forward_kl", "jsd"})
"""Kinds that compare whole distributions."""

SAMPLED = frozenset({"policy_gradient", "k2", "k3"})
"""Kinds that read one teacher log-prob a token, the sampled token's."""

TRAPS = {
    "k1": "log p - log q differentiated directly has an expected gradient of 0, whatever the teacher says; take "
    "policy_gradient, which weights the gradient of log p with it (k1 itself is logged as reverse_kl)",
    "state_advantage": "an advantage that is the same for every token of a position, such as its top-K KL, has an "
    "expected gradient of 0; take policy_gradient, whose advantage is the token's own, or "
    "stop_gradient_reverse_kl, which weights each token of the top-K",
}


class LossConfig(Section):
    """What is descended."""

    kind: LossKind = "stop_gradient_reverse_kl"
    """`reverse_kl`, `forward_kl` and `jsd` ask the teacher for its whole vocabulary: for small vocabularies.
    `policy_gradient`, `k2` and `k3` use the sampled token alone. `biased_reverse_kl` is for study: it leaks mass."""
    support: Literal["student", "teacher", "intersection", "union"] = "student"
    """Whose most likely ids a truncated loss runs over; other losses ignore it."""
    top_k: PositiveInt = 20
    """K of the support, and of the monitors; a vocabulary smaller than K is taken whole."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The teacher's weight in jsd, near 0 like forward_kl and near 1 like reverse_kl; None is 0.5. For jsd alone."""
    importance: Literal["truncated", "clipped"] | None = None
    """Whether a sampled token's loss is weighted by p / mu of when it was drawn: at most `importance_limit`
    ("truncated"), or at least its inverse too ("clipped"). For sampled-token losses alone."""
    importance_limit: Annotated[float, Field(ge=1)] = 2.0
    """The largest importance weight."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_trap(cls, kind: Any) -> Any:
        if kind in TRAPS:
            raise ValueError(f"{kind!r} is no loss: {TRAPS[kind]}")
        return kind

    @model_validator(mode="before")
    @classmethod
    def _one_temperature(cls, table: Any) -> Any:
        if isinstance(table, dict) and (named := sorted(key for key in table if "temperature" in str(key))):
            raise ValueError(
                f"{named[0]}: a loss has no temperature of its own; both models' log-probs are taken at "
                "rollout.temperature, since between two temperatures p = q is not where descent stops"
            )
        return table

    @model_validator(mode="after")
    def _options_of_the_kind(self) -> Self:
        if self.beta is not None and self.kind != "jsd":
            raise ValueError(f"beta is of jsd alone, and kind is {self.kind}: leave beta out or set kind to jsd")
        if self.importance is not None and self.kind not in SAMPLED:
            raise ValueError(
                f"importance is of sampled-token losses ({', '.join(sorted(SAMPLED))}) alone, and kind is {self.kind}: "
                "leave importance out"
            )
        return self
