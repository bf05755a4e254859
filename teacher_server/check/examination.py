"""What a check is given and what it finds: items of random ids, the first scored alone, and nats between results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from protos.client import Teacher
from protos.records import PAD_ID, Float32, ScoreItem, ScoreResult, TeacherInfo

FLOAT32_BOUND, HALF_BOUND = 1e-4, 5e-2
"""Nats by which equal requests may differ: the order of sums in float32, and in 8 to 11 bits of mantissa."""

TOP_K, NUM_CANDIDATES = 20, 8
NUM_OTHERS = 8
"""Items beside the one that is scored in a batch."""
PROMPT_LENGTHS = (260, 132, 68, 36, 20, 4)
"""Tokens, the first that fits. Caches hold whole blocks of 16 to 128 tokens: 4 beyond a block and SHORT_COMPLETION
tokens more end inside the next one, so a repeat reads the prompt's blocks and computes every wanted row."""
LONG_COMPLETION, SHORT_COMPLETION = 48, 8
TEMPERATURE = 2.0

Verdict = Literal["pass", "FAIL", "not offered"]


@dataclass(frozen=True)
class Finding:
    """One check: what was compared, the largest difference in `unit`, and the most it may be.

    `difference` is None where the teacher does not offer what the check needs. NaN fails.
    """

    name: str
    compared: str
    difference: float | None
    bound: float
    unit: str = "nats"

    @property
    def verdict(self) -> Verdict:
        """What the difference means."""
        if self.difference is None:
            return "not offered"
        return "pass" if self.difference <= self.bound else "FAIL"


@dataclass(frozen=True)
class Examination:
    """One teacher under examination.

    Attributes:
        item: random ids with every support the teacher offers; candidate 0 is the completion's own id, and the last
            candidate of every second row is padding.
        short: the same with a completion that ends in the block in which the prompt ends.
        others: unlike items to share a batch with.
        alone: the result of `item`, alone in its request and before anything was cached.
        bound: nats.
    """

    teacher: Teacher
    info: TeacherInfo
    item: ScoreItem
    short: ScoreItem
    others: tuple[ScoreItem, ...]
    alone: ScoreResult
    bound: float
    timeout_s: float

    async def score(self, *items: ScoreItem) -> list[ScoreResult]:
        """The teacher's results, in order."""
        return await self.teacher.score(items, timeout_s=self.timeout_s)

    def found(self, name: str, compared: str, difference: float | None) -> Finding:
        """A finding in nats."""
        return Finding(name, compared, difference, self.bound)

    def offers(self, *supports: str) -> bool:
        """Whether the teacher offers all of these."""
        return set(supports) <= set(self.info.supports)


async def examination(teacher: Teacher, *, seed: int, bound: float | None, timeout_s: float) -> Examination:
    """Draws the items and scores the first one alone."""
    info = await teacher.info()
    rng = np.random.default_rng(seed)
    num_long = max(1, min(LONG_COMPLETION, info.max_context_tokens // 4))
    num_prompt = next((n for n in PROMPT_LENGTHS if n + num_long <= info.max_context_tokens), 1)
    item = _draw(rng, info, num_prompt, num_long)
    short = _draw(rng, info, num_prompt, min(SHORT_COMPLETION, num_long))
    others = tuple(
        replace(
            _draw(rng, info, 1 + int(rng.integers(num_prompt)), 1 + int(rng.integers(num_long))),
            temperature=float(rng.choice((0.5, TEMPERATURE))) if info.exact_temperature else 1.0,
        )
        for _ in range(min(NUM_OTHERS, info.max_items - 1))
    )
    [alone] = await teacher.score([item], timeout_s=timeout_s)
    bound = default_bound(info.dtype) if bound is None else bound
    return Examination(teacher, info, item, short, others, alone, bound, timeout_s)


def default_bound(dtype: str) -> float:
    """Nats by which equal requests may differ at this dtype of weights and activations."""
    return FLOAT32_BOUND if dtype == "float32" else HALF_BOUND


def largest_difference(one: ScoreResult, other: ScoreResult) -> float:
    """Nats between two results of one item; NaN where one has a value and the other has none.

    Top-K is compared rank by rank, because two ids that are equally likely may swap.
    """
    return float(row_differences(one, other, sampled=True).max(initial=0.0))


def row_differences(one: ScoreResult, other: ScoreResult, *, sampled: bool = False) -> Float32:
    """float32 [T]: the largest difference of each row's distribution, and of its sampled log-prob where asked for."""
    pairs = [
        (one.top_logprobs, other.top_logprobs),
        (one.candidate_logprobs[:, 1:], other.candidate_logprobs[:, 1:]),
    ]
    if one.entropy is not None and other.entropy is not None:
        pairs.append((one.entropy[:, None], other.entropy[:, None]))
    if sampled:
        pairs.append((one.sampled_logprobs[:, None], other.sampled_logprobs[:, None]))
        pairs.append((one.candidate_logprobs[:, :1], other.candidate_logprobs[:, :1]))
    a, b = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    return np.where(np.isnan(a) & np.isnan(b), np.float32(0), np.abs(a - b)).max(axis=1, initial=0.0)


def _draw(rng: np.random.Generator, info: TeacherInfo, num_prompt: int, num_completion: int) -> ScoreItem:
    """An item of random ids with every support that is offered."""
    vocab_size = info.tokenizer.vocab_size
    prompt, completion = (rng.integers(0, vocab_size, n).astype(np.int32) for n in (num_prompt, num_completion))
    candidates = rng.integers(0, vocab_size, (num_completion, min(NUM_CANDIDATES, info.max_candidates)))
    candidates[:, :1] = completion[:, None]
    candidates[1::2, 1:][:, -1:] = PAD_ID
    return ScoreItem(
        prompt=prompt,
        completion_ids=completion,
        top_k=min(TOP_K, info.max_top_k, vocab_size) if "top_k" in info.supports else 0,
        candidate_ids=candidates.astype(np.int32) if "candidates" in info.supports else None,
        entropy="entropy" in info.supports,
    )
