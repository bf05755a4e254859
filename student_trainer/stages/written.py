"""One step's rollouts with their scores on the way: each is asked for from the moment that its rollout has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from protos.records import ScoreResult
from student_trainer.rollout.base import Rollout


@dataclass(frozen=True)
class Written:
    """One step's rollouts and scores, in the rollouts' order.

    Attributes:
        rollout_s: seconds of writing.
        score_s: seconds in which any score was on its way.
        waited_s: seconds of waiting for the scores alone.
    """

    rollouts: Sequence[Rollout]
    results: Sequence[ScoreResult]
    rollout_s: float
    score_s: float
    waited_s: float


@dataclass
class _Part:
    """Rollouts that ended together, by place, and the request for their scores; seconds of `time.perf_counter`."""

    ended: dict[int, Rollout]
    scores: Future[list[ScoreResult]]
    asked: float
    answered: float = field(default=0.0)

    def note_answer(self, _: object) -> None:
        self.answered = time.perf_counter()


class Scoring:
    """Writes one step's rollouts, and has them scored meanwhile and while the caller goes on.

    Args:
        parts: the rollouts as they end; see `Sampler.stream`.
        score: begins a request for the scores of some, which come in their order.
    """

    def __init__(
        self,
        parts: Iterable[dict[int, Rollout]],
        score: Callable[[Sequence[Rollout]], Future[list[ScoreResult]]],
    ) -> None:
        self._parts: list[_Part] = []
        started = time.perf_counter()
        try:
            for ended in parts:
                part = _Part(ended, score(list(ended.values())), time.perf_counter())
                part.scores.add_done_callback(part.note_answer)
                self._parts.append(part)
        except BaseException:
            self.cancel()
            raise
        self._rollout_s = time.perf_counter() - started

    def result(self) -> Written:
        """Waits for the scores; raises what scoring raised."""
        asked = time.perf_counter()
        pairs = {
            place: (rollout, result)
            for part in self._parts
            for (place, rollout), result in zip(part.ended.items(), part.scores.result(), strict=True)
        }
        got = time.perf_counter()
        rollouts, results = zip(*(pairs[place] for place in range(len(pairs))), strict=True)
        # A callback may come after the result that it follows.
        spans = [(part.asked, part.answered or got) for part in self._parts]
        return Written(rollouts, results, self._rollout_s, covered(spans), got - asked)

    def cancel(self) -> None:
        """Gives the scores up."""
        for part in self._parts:
            part.scores.cancel()


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
