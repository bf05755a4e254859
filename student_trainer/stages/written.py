"""One step's rollouts with their scores on the way: each is asked for from the moment that its rollout has ended, and
where it was handed over before, its beginning from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import numpy as np

from protos.records import ScoreResult, crc32_of
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
    """The places that one request is about, and the request; seconds of `time.perf_counter`."""

    places: Sequence[int]
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
        in_pieces: whether they may be asked for in pieces: for what is handed over before it has ended, if all that was
            asked before is answered then, and for the rest.
    """

    def __init__(
        self,
        parts: Iterable[dict[int, Rollout]],
        score: Callable[[Sequence[Rollout]], Future[list[ScoreResult]]],
        *,
        in_pieces: bool = False,
    ) -> None:
        self._parts: list[_Part] = []
        self._rollouts: dict[int, Rollout] = {}
        num_asked: dict[int, int] = {}
        started = time.perf_counter()
        try:
            for written in parts:
                takes_pieces = in_pieces and all(part.scores.done() for part in self._parts)
                now = {place: rollout for place, rollout in written.items() if takes_pieces or rollout.is_whole}
                if now:
                    pieces = [rollout.after(num_asked.get(place, 0)) for place, rollout in now.items()]
                    part = _Part(list(now), score(pieces), time.perf_counter())
                    part.scores.add_done_callback(part.note_answer)
                    self._parts.append(part)
                num_asked |= {place: len(rollout.completion_ids) for place, rollout in now.items()}
                self._rollouts |= now
        except BaseException:
            self.cancel()
            raise
        self._rollout_s = time.perf_counter() - started

    def result(self) -> Written:
        """Waits for the scores; raises what scoring raised."""
        asked = time.perf_counter()
        pieces: dict[int, list[ScoreResult]] = {place: [] for place in range(len(self._rollouts))}
        for part in self._parts:
            for place, result in zip(part.places, part.scores.result(), strict=True):
                pieces[place].append(result)
        got = time.perf_counter()
        rollouts = [self._rollouts[place] for place in pieces]
        results = [joined(of_one, rollout) for of_one, rollout in zip(pieces.values(), rollouts, strict=True)]
        # A callback may come after the result that it follows.
        spans = [(part.asked, part.answered or got) for part in self._parts]
        return Written(rollouts, results, self._rollout_s, covered(spans), got - asked)

    def cancel(self) -> None:
        """Gives the scores up."""
        for part in self._parts:
            part.scores.cancel()


def joined(pieces: Sequence[ScoreResult], rollout: Rollout) -> ScoreResult:
    """The scores of a rollout from those of its pieces, in order; its seconds are theirs together."""
    first, *others = pieces
    if not others:
        return first
    return replace(
        first,
        sampled_logprobs=np.concatenate([piece.sampled_logprobs for piece in pieces]),
        top_ids=np.concatenate([piece.top_ids for piece in pieces]),
        top_logprobs=np.concatenate([piece.top_logprobs for piece in pieces]),
        candidate_logprobs=np.concatenate([piece.candidate_logprobs for piece in pieces]),
        entropy=None
        if first.entropy is None
        else np.concatenate([piece.entropy for piece in pieces if piece.entropy is not None]),
        queue_s=sum(piece.queue_s for piece in pieces),
        engine_s=sum(piece.engine_s for piece in pieces),
        completion_crc32=crc32_of(rollout.completion_ids),
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
