"""What a rollout is, and what a sampler must do. Shape letters: N prompt tokens, T completion tokens, K support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from protos.records import Float32, Int32
from student_trainer.tasks import Problem


@dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn.

    Attributes:
        max_new_tokens: the budget; a completion that reaches it without EOS is unfinished.
        temperature: 0 is greedy.
        top_p: nucleus; 1.0 keeps everything.
        num_samples: completions for each problem.
        top_ids: K, how many of the student's most likely ids to keep at each position.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_samples: int = 1
    top_ids: int = 0


@dataclass(frozen=True)
class Rollout:
    """One completion that the student wrote.

    Attributes:
        prompt_ids: int32 [N], the problem as the student sees it, without privileged information.
        completion_ids: int32 [T], EOS last when it is finished.
        logprobs: float32 [T] in nats, log_softmax(logits / temperature) at the sampled ids, before top-p; at
            temperature 0 under log_softmax(logits).
        top_ids: int32 [T, K], the student's most likely ids where each token was sampled, most likely first.
        is_finished: whether EOS ended it.
        text: the completion decoded, special tokens left out.
    """

    problem: Problem
    prompt_ids: Int32
    completion_ids: Int32
    logprobs: Float32
    top_ids: Int32
    is_finished: bool
    text: str


class Sampler(Protocol):
    """Writes completions with the student's current weights. Who implements it by name inherits `sample`."""

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        """`params.num_samples` completions of each problem, handed over in parts as they end.

        Each has its place for a key: sample s of problem i is `i * params.num_samples + s`. Every place comes once. In
        which order they come decides nothing about them.

        Args:
            seeds: one for each problem; with the weights and the sample's number in its group it determines a
                completion, whatever else is in the batch.
        """
        ...

    def sample(self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]) -> list[Rollout]:
        """The completions of `stream`, grouped by problem."""
        written: dict[int, Rollout] = {}
        for ended in self.stream(problems, params, seeds=seeds):
            written |= ended
        return [written[place] for place in range(len(written))]

    def close(self) -> None:
        """Frees what the sampler opened."""
        ...
