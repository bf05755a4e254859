"""Two answers to each problem, right or wrong: did the change matter? Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from student_trainer.evaluate import Z_95


@dataclass(frozen=True)
class Paired:
    """The four cells of n problems answered under two conditions, `before` and `after`.

    Attributes:
        both_right, both_wrong: problems that the conditions agree on.
        right_to_wrong: right before, wrong after.
        wrong_to_right: wrong before, right after.
    """

    both_right: int
    right_to_wrong: int
    wrong_to_right: int
    both_wrong: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Paired:
        """Counts the cells; entry i of both is problem i."""
        cells = [(bool(a), bool(b)) for a, b in zip(before, after, strict=True)]
        return cls(*(cells.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def num_problems(self) -> int:
        """n."""
        return self.both_right + self.right_to_wrong + self.wrong_to_right + self.both_wrong

    @property
    def difference(self) -> float:
        """Accuracy after less accuracy before; NaN without problems."""
        if not self.num_problems:
            return math.nan
        return (self.wrong_to_right - self.right_to_wrong) / self.num_problems

    @property
    def p_value(self) -> float:
        """McNemar's exact test, two-sided: where nothing changed, a problem that the conditions disagree on goes either
        way with probability 1/2 (McNemar 1947; the exact binomial form).
        """
        num_discordant = self.right_to_wrong + self.wrong_to_right
        fewer = min(self.right_to_wrong, self.wrong_to_right)
        tail = sum(math.comb(num_discordant, k) for k in range(fewer + 1))
        return min(1.0, 2 * tail / 2**num_discordant)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `difference`: Agresti and Min's adjusted Wald interval, which adds 1/2 to each cell ("Simple
        improved confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005, 729-740).
        """
        num = self.num_problems + 2
        gap = self.wrong_to_right - self.right_to_wrong
        spread = self.wrong_to_right + self.right_to_wrong + 1 - gap**2 / num
        half = Z_95 * math.sqrt(spread) / num
        return max(-1.0, gap / num - half), min(1.0, gap / num + half)

    def figures(self) -> dict[str, float | int | list[float]]:
        """By name, for the result."""
        return {
            "difference": self.difference,
            "interval": list(self.interval),
            "right_to_wrong": self.right_to_wrong,
            "wrong_to_right": self.wrong_to_right,
            "p_value": self.p_value,
        }
