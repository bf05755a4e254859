"""What the teacher thinks of each token of a rollout, as classes of colour: log q(y) - log p(y), in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from student_trainer.run_folder import Row

FULL_COLOUR_NATS = 3.0
"""From here on, either way, the colour is full: the teacher gives the token 20 times or 1/20 of the student's p."""

LEVELS = 5
"""Shades on either side of none."""

NUM_NAMED = 3
"""Tokens told in words too, for those who do not see the colours."""


@dataclass(frozen=True)
class Token:
    """One token's text, its advantage in words, and its colour's level from -LEVELS to LEVELS."""

    text: str
    title: str
    level: int


def tokens_of(row: Row) -> list[Token]:
    """The tokens of a rollout; empty when its advantages were not logged."""
    if "teacher_advantage" not in row:
        return []
    return [
        Token(text, f"{text!r}: {advantage:+.2f} nats", level_of(advantage))
        for text, advantage in zip(row["tokens"], row["teacher_advantage"], strict=True)
    ]


def level_of(advantage: float) -> int:
    """The shade of an advantage; 0 for one that is not a number."""
    if not math.isfinite(advantage):
        return 0 if math.isnan(advantage) else int(math.copysign(LEVELS, advantage))
    return max(-LEVELS, min(LEVELS, round(LEVELS * advantage / FULL_COLOUR_NATS)))


def in_words(row: Row) -> str:
    """The mean advantage and the tokens that the teacher finds least likely beside the student; "" without any."""
    if "teacher_advantage" not in row:
        return ""
    pairs = zip(row["tokens"], row["teacher_advantage"], strict=True)
    finite = [(advantage, text) for text, advantage in pairs if math.isfinite(advantage)]
    if not finite:
        return ""
    mean = sum(advantage for advantage, _ in finite) / len(finite)
    lowest = ", ".join(f"{text!r} ({advantage:+.2f})" for advantage, text in sorted(finite)[:NUM_NAMED])
    return f"Mean teacher advantage {mean:+.2f} nats; lowest: {lowest}."


def legend() -> Sequence[tuple[int, float]]:
    """Each level with the advantage in nats that it stands for."""
    return [(level, level * FULL_COLOUR_NATS / LEVELS) for level in range(-LEVELS, LEVELS + 1)]
