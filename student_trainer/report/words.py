"""Which words the student writes more and less often as a run goes on: the first, the middle and the last steps."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from student_trainer.config.watch import HEDGES
from student_trainer.run_folder import Row

MIN_WORDS = 300
"""A frequency is taken over at least so many words, of neighbouring steps where one step's rollouts hold fewer."""

NUM_WORDS = 16
"""Shown: those whose frequency changed most."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Sample:
    """The words of a few neighbouring steps, first to last, and how often each occurs."""

    first: int
    last: int
    counts: Counter[str]

    @property
    def total(self) -> int:
        """How many words there are."""
        return self.counts.total()

    def per_thousand(self, word: str) -> float:
        """The word's frequency among 1,000 words."""
        return 1000 * self.counts[word] / self.total


@dataclass(frozen=True)
class Word:
    """A word's frequency (of 1,000 words) in each sample."""

    text: str
    per_thousand: tuple[float, ...]

    @property
    def change(self) -> float:
        """Of the frequency, from the first sample to the last."""
        return self.per_thousand[-1] - self.per_thousand[0]

    @property
    def is_hedge(self) -> bool:
        """Whether it is a word of wavering: "wait", "maybe"."""
        return self.text in HEDGES


def samples_of(rollouts: Sequence[Row]) -> list[Sample]:
    """The first, the middle and the last steps' words; empty when there are fewer than three steps with words."""
    by_step: dict[int, Counter[str]] = {}
    for row in rollouts:
        by_step.setdefault(row["step"], Counter()).update(_WORD.findall(row["text"].lower()))
    steps = sorted(step for step, counts in by_step.items() if counts)
    if len(steps) < 3:
        return []
    middle = len(steps) // 2
    # Samples never share a step: each has at most a third of them.
    longest = len(steps) // 3
    return [
        _gather(by_step, steps[:longest]),
        _gather(by_step, steps[middle - longest // 2 :][:longest]),
        _gather(by_step, steps[::-1][:longest]),
    ]


def changed_words(samples: Sequence[Sample]) -> list[Word]:
    """The words whose frequency changed most from the first sample to the last, what rose most first."""
    texts = {text for sample in samples for text in sample.counts}
    words = [Word(text, tuple(sample.per_thousand(text) for sample in samples)) for text in texts]
    most = sorted(words, key=lambda word: (-abs(word.change), word.text))[:NUM_WORDS]
    return sorted(most, key=lambda word: (-word.change, word.text))


def _gather(by_step: dict[int, Counter[str]], steps: Sequence[int]) -> Sample:
    """As many of `steps`, in their order, as give MIN_WORDS words."""
    counts: Counter[str] = Counter()
    taken: list[int] = []
    for step in steps:
        if counts.total() >= MIN_WORDS:
            break
        counts += by_step[step]
        taken.append(step)
    return Sample(min(taken), max(taken), counts)
