"""What is still to be asked, in batches and within a budget; every answer is on disk before the next is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from student_trainer.probes.folder import ProbeFolder
from student_trainer.run_folder import Row

T = TypeVar("T")


class BudgetSpent(Exception):
    """The next question might take more tokens than are left; everything before it is on disk."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """One thing to ask a model.

    Attributes:
        key: of the raw row that will hold the answer.
        item: what `ask` needs to ask it.
        most_tokens: how many tokens will be written and scored for it, at most.
    """

    key: str
    item: T
    most_tokens: int


@dataclass(frozen=True)
class Collection:
    """Asks what is not in the folder yet.

    Attributes:
        folder: where answers go.
        batch_size: questions asked together.
        max_tokens: written and scored in all, those of earlier runs of the same probe included; None for no limit. It
            is never passed.
    """

    folder: ProbeFolder
    batch_size: int
    max_tokens: int | None = None

    def answers(self, questions: Sequence[Question[T]], ask: Callable[[Sequence[T]], Sequence[Row]]) -> list[Row]:
        """One raw row a question, in order.

        Args:
            ask: from the items of some questions to their rows, without keys.

        Raises:
            BudgetSpent: before a question that might not fit.
        """
        missing = [question for question in questions if question.key not in self.folder.rows]
        for batch in self._batches(missing):
            rows = ask([question.item for question in batch])
            pairs = zip(batch, rows, strict=True)
            self.folder.add([{"key": question.key, **row} for question, row in pairs])
        return [self.folder.rows[question.key] for question in questions]

    def _batches(self, questions: Sequence[Question[T]]) -> Iterator[Sequence[Question[T]]]:
        start = 0
        while start < len(questions):
            num = self._num_that_fit(questions[start : start + self.batch_size])
            if not num:
                raise BudgetSpent
            yield questions[start : start + num]
            start += num

    def _num_that_fit(self, questions: Sequence[Question[T]]) -> int:
        if self.max_tokens is None:
            return len(questions)
        left = self.max_tokens - self.folder.num_tokens
        num = 0
        for question in questions:
            left -= question.most_tokens
            if left < 0:
                break
            num += 1
        return num
