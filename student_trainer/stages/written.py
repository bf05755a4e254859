"""One step's rollouts with their scores on the way: each is asked for from the moment that its rollout has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from protos.records import ScoreResult
from student_trainer.rollout.base import Rollout
from student_trainer.stages.base import Metrics


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

    Attributes:
        rollouts: in the order of their places.
        rollout_s: seconds of writing.
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
        self.rollout_s = time.perf_counter() - started
        written = {place: rollout for part in self._parts for place, rollout in part.ended.items()}
        self.rollouts = [written[place] for place in range(len(written))]
        self._found = {place: (part, i) for part in self._parts for i, place in enumerate(part.ended)}
        self._waited_s = 0.0

    @property
    def answers(self) -> list[Callable[[], ScoreResult]]:
        """Of each rollout, in their order: waits for its score; raises what scoring raised."""
        return [partial(self._answer, place) for place in range(len(self.rollouts))]

    def metrics(self) -> Metrics:
        """Seconds of waiting for the scores alone, and scored tokens per second in which any was on its way; once all
        are there.
        """
        now = time.perf_counter()
        # A callback may come after the result that it follows.
        score_s = covered((part.asked, part.answered or now) for part in self._parts)
        num_tokens = sum(len(rollout.completion_ids) for rollout in self.rollouts)
        return {"score_s": self._waited_s, "scored_tokens_per_s": num_tokens / score_s}

    def cancel(self) -> None:
        """Gives the scores up."""
        for part in self._parts:
            part.scores.cancel()

    def _answer(self, place: int) -> ScoreResult:
        part, index = self._found[place]
        asked = time.perf_counter()
        results = part.scores.result()
        self._waited_s += time.perf_counter() - asked
        return results[index]


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
