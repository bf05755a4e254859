"""Whether a teacher's answers agree with themselves, with its replicas' and with a reference model's.

Every check is a function of an Examination and returns one Finding. None of them needs to know the model: they use what
must hold for any, such as that a row does not depend on tokens after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from protos.client import Teacher
from protos.fingerprint import differences
from protos.records import (
    PAD_ID,
    Float32,
    Int32,
    PrivilegedIds,
    ScoreItem,
    ScoreResult,
    TeacherInfo,
    TokenizerFingerprint,
)

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


class ReferenceModel(Protocol):
    """The same model run by other code."""

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """Of its tokenizer."""
        ...

    def logprobs(self, context_ids: Int32, completion_ids: Int32, temperature: float) -> Float32:
        """float32 [T, V] in nats: log_softmax(logits / temperature) for each completion token."""
        ...


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


async def check(
    teachers: Sequence[Teacher],
    *,
    seed: int,
    bound: float | None = None,
    timeout_s: float = 120.0,
    reference: ReferenceModel | None = None,
) -> list[Finding]:
    """Every finding about the first teacher, about the others as its replicas, and about the reference.

    Args:
        seed: of the ids; equal seeds ask for equal texts, which a second run finds in the teacher's cache.
        bound: nats by which equal requests may differ; `default_bound` of the teacher's dtype when None.

    Raises:
        TeacherError: a teacher refused a request or could not be reached.
    """
    exam = await examination(teachers[0], seed=seed, bound=bound, timeout_s=timeout_s)
    findings = [await one(exam) for one in CHECKS]
    for other in teachers[1:]:
        findings += [await replica_tokenizer(exam, other), await replica_logprobs(exam, other)]
    if reference is not None:
        findings += [reference_tokenizer(exam, reference), await reference_logprobs(exam, reference)]
    return findings


def default_bound(dtype: str) -> float:
    """Nats by which equal requests may differ at this dtype of weights and activations."""
    return FLOAT32_BOUND if dtype == "float32" else HALF_BOUND


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


async def in_a_batch(exam: Examination) -> Finding:
    """The item among others in one request."""
    half = len(exam.others) // 2
    results = await exam.score(*exam.others[:half], exam.item, *exam.others[half:])
    compared = f"an item alone and among {len(exam.others)} others of other lengths and temperatures"
    return exam.found("in a batch", compared, largest_difference(exam.alone, results[half]))


async def again(exam: Examination) -> Finding:
    """The item a second time, when a cache may hold the completion too."""
    [result] = await exam.score(exam.item)
    return exam.found("again", "an item and the same item later", largest_difference(exam.alone, result))


async def after_a_cache_hit(exam: Examination) -> Finding:
    """A short item before and after its prompt is in the cache."""
    [first] = await exam.score(exam.short)
    [second] = await exam.score(exam.short)
    compared = f"the same with {second.num_cached_tokens} of {second.num_context_tokens} context tokens from the cache"
    return exam.found("after a cache hit", compared, largest_difference(first, second))


async def looks_ahead(exam: Examination) -> Finding:
    """Rows up to a completion token's own, with that token and with another in its place."""
    changed_at = len(exam.item.completion_ids) // 2
    [result] = await exam.score(_with_another_id(exam, changed_at))
    difference = _row_differences(exam.alone, result)[: changed_at + 1]
    compared = "rows up to a completion token's own, with that token and with another"
    return exam.found("no row sees its own token", compared, float(difference.max()) if _has_rows(exam) else None)


async def sees_the_token_before(exam: Examination) -> Finding:
    """The row behind a changed completion token: it must change."""
    changed_at = (len(exam.item.completion_ids) - 1) // 2
    name, compared = "rows see the token before", "the row after a completion token, with that token and with another"
    if not _has_rows(exam) or len(exam.item.completion_ids) < 2:
        return Finding(name, compared, None, 0, "rows unchanged")
    [result] = await exam.score(_with_another_id(exam, changed_at))
    unchanged = _row_differences(exam.alone, result)[changed_at + 1] == 0
    return Finding(name, compared, float(unchanged), 0, "rows unchanged")


async def split_elsewhere(exam: Examination) -> Finding:
    """Half of the completion moved to the prompt: the other half's rows stay what they were."""
    half = len(exam.item.completion_ids) // 2
    assert isinstance(exam.item.prompt, np.ndarray)
    moved = replace(
        exam.item,
        prompt=np.concatenate([exam.item.prompt, exam.item.completion_ids[:half]]),
        completion_ids=exam.item.completion_ids[half:],
        candidate_ids=None if exam.item.candidate_ids is None else exam.item.candidate_ids[half:],
    )
    [result] = await exam.score(moved)
    compared = "the completion's second half, with its first half in the prompt"
    return exam.found("split elsewhere", compared, largest_difference(_rows_from(exam.alone, half), result))


async def privileged_ids(exam: Examination) -> Finding:
    """Privileged ids before the prompt, and the same ids as part of it: one context, the same rows."""
    assert isinstance(exam.item.prompt, np.ndarray)
    half = (len(exam.item.prompt) + 1) // 2
    told = replace(exam.item, privileged=PrivilegedIds(exam.item.prompt[:half]), prompt=exam.item.prompt[half:])
    name, compared = "privileged ids", f"{half} ids as privileged information and as part of the prompt"
    if "ids" not in exam.info.privileged_kinds:
        return exam.found(name, compared, None)
    [result] = await exam.score(told)
    return exam.found(name, compared, largest_difference(exam.alone, result))


async def top_k_order(exam: Examination) -> Finding:
    """Most likely first."""
    steps = np.diff(exam.alone.top_logprobs, axis=1)
    difference = float(steps.max(initial=0.0)) if exam.item.top_k else None
    return Finding("top-K order", f"each of the {exam.item.top_k} log-probs and the one before it", difference, 0.0)


async def top_k_is_highest(exam: Examination) -> Finding:
    """No id that is not among the top-K is more likely than the last of them."""
    compared = "the least likely of the top-K and every other id asked for"
    if not (exam.item.top_k and exam.offers("candidates")):
        return exam.found("top-K is the highest", compared, None)
    assert exam.item.candidate_ids is not None
    is_top_TM = (exam.item.candidate_ids[:, :, None] == exam.alone.top_ids[:, None, :]).any(-1)
    is_other_TM = ~is_top_TM & (exam.item.candidate_ids != PAD_ID)
    excess_TM = exam.alone.candidate_logprobs - exam.alone.top_logprobs[:, -1:]
    return exam.found("top-K is the highest", compared, float(excess_TM[is_other_TM].max(initial=0.0)))


async def top_k_as_candidates(exam: Examination) -> Finding:
    """The teacher's top ids asked for as the caller's own."""
    compared = "the top-K and the same ids asked for as candidates"
    if not (exam.item.top_k and exam.offers("candidates")):
        return exam.found("top-K as candidates", compared, None)
    num_asked = min(exam.item.top_k, exam.info.max_candidates)
    [result] = await exam.score(replace(exam.item, candidate_ids=exam.alone.top_ids[:, :num_asked]))
    difference = np.abs(result.candidate_logprobs - exam.alone.top_logprobs[:, :num_asked]).max()
    return exam.found("top-K as candidates", compared, float(difference))


async def sampled_as_candidate(exam: Examination) -> Finding:
    """The completion's own ids asked for as candidates."""
    compared = "the completion's log-probs and the same ids asked for as candidates"
    if not exam.offers("candidates"):
        return exam.found("sampled as candidate", compared, None)
    difference = np.abs(exam.alone.candidate_logprobs[:, 0] - exam.alone.sampled_logprobs).max()
    return exam.found("sampled as candidate", compared, float(difference))


async def padding(exam: Examination) -> Finding:
    """Padded candidates have no log-prob."""
    compared = "padded candidates, whose log-probs must be NaN"
    if not exam.offers("candidates"):
        return Finding("padding", compared, None, 0, "values")
    is_wrong = np.isnan(exam.alone.candidate_logprobs) != (exam.item.candidate_ids == PAD_ID)
    return Finding("padding", compared, float(is_wrong.sum()), 0, "values")


async def probabilities(exam: Examination) -> Finding:
    """The widest top-K: at most 1 together; exactly 1 where it is the whole vocabulary."""
    temperatures = (1.0, TEMPERATURE) if exam.info.exact_temperature else (1.0,)
    top_k = min(exam.info.max_top_k, exam.info.tokenizer.vocab_size)
    is_whole = top_k == exam.info.tokenizer.vocab_size
    compared = f"the sum of the top {top_k} probabilities and 1" + ("" if is_whole else ", which it may not exceed")
    if not exam.offers("top_k") or top_k == 0:
        return exam.found("probabilities", compared, None)
    results = await exam.score(*(replace(exam.item, top_k=top_k, temperature=t) for t in temperatures))
    log_sums = np.concatenate([np.logaddexp.reduce(result.top_logprobs, axis=1) for result in results])
    return exam.found("probabilities", compared, float((np.abs(log_sums) if is_whole else log_sums.clip(0)).max()))


async def temperature(exam: Examination) -> Finding:
    """log q_T(a) - log q_T(b) = (log q_1(a) - log q_1(b)) / T for any two ids: the normaliser cancels."""
    compared = f"log-ratios of candidates at temperature {TEMPERATURE:g} and at 1, divided by {TEMPERATURE:g}"
    if not (exam.offers("candidates") and exam.info.exact_temperature):
        return exam.found("temperature", compared, None)
    [result] = await exam.score(replace(exam.item, temperature=TEMPERATURE))
    ratios, expected = (each.candidate_logprobs - each.candidate_logprobs[:, :1] for each in (result, exam.alone))
    difference = np.abs(ratios - expected / TEMPERATURE)[exam.item.candidate_ids != PAD_ID]
    return exam.found("temperature", compared, float(difference.max()))


CHECKS = (
    in_a_batch,
    again,
    after_a_cache_hit,
    looks_ahead,
    sees_the_token_before,
    split_elsewhere,
    privileged_ids,
    top_k_order,
    top_k_is_highest,
    top_k_as_candidates,
    sampled_as_candidate,
    padding,
    probabilities,
    temperature,
)
"""The checks of one teacher, in the order in which they are asked and shown."""


async def replica_tokenizer(exam: Examination, other: Teacher) -> Finding:
    """The fingerprints of two replicas."""
    told = differences(exam.info.tokenizer, (await other.info()).tokenizer)
    return _tokenizers(f"tokenizer of {other.url}", f"the fingerprint with that of {exam.teacher.url}", told)


async def replica_logprobs(exam: Examination, other: Teacher) -> Finding:
    """The same item on two replicas."""
    [result] = await other.score([exam.item], timeout_s=exam.timeout_s)
    compared = f"the same item with {exam.teacher.url}"
    return exam.found(f"log-probs of {other.url}", compared, largest_difference(exam.alone, result))


def reference_tokenizer(exam: Examination, reference: ReferenceModel) -> Finding:
    """The fingerprint, chat template included, against the reference's."""
    told = differences(exam.info.tokenizer, reference.fingerprint)
    return _tokenizers("reference's tokenizer", "tokenizer and chat template with the reference's", told)


async def reference_logprobs(exam: Examination, reference: ReferenceModel) -> Finding:
    """Every support against the reference's log_softmax, at each temperature that is offered."""
    temperatures = (1.0, TEMPERATURE) if exam.info.exact_temperature else (1.0,)
    results = await exam.score(*(replace(exam.item, temperature=t) for t in temperatures))
    assert isinstance(exam.item.prompt, np.ndarray)
    worst = 0.0
    for at, result in zip(temperatures, results, strict=True):
        logp_TV = reference.logprobs(exam.item.prompt, exam.item.completion_ids, at)
        worst = float(np.maximum(worst, _reference_difference(exam.item, result, logp_TV)))
    compared = (
        f"every log-prob with the reference's log_softmax, at temperature {' and '.join(map(_short, temperatures))}"
    )
    return exam.found("reference's log-probs", compared, worst)


def largest_difference(one: ScoreResult, other: ScoreResult) -> float:
    """Nats between two results of one item; NaN where one has a value and the other has none.

    Top-K is compared rank by rank, because two ids that are equally likely may swap.
    """
    return float(_row_differences(one, other, sampled=True).max(initial=0.0))


def _row_differences(one: ScoreResult, other: ScoreResult, *, sampled: bool = False) -> Float32:
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


def _reference_difference(item: ScoreItem, result: ScoreResult, logp_TV: Float32) -> float:
    ids_T1 = item.completion_ids[:, None]
    pairs = [(result.sampled_logprobs[:, None], np.take_along_axis(logp_TV, ids_T1, 1))]
    if item.top_k:
        pairs.append((result.top_logprobs, np.take_along_axis(logp_TV, result.top_ids, 1)))
        pairs.append((result.top_logprobs, -np.sort(-logp_TV, axis=1)[:, : item.top_k]))
    if item.candidate_ids is not None:
        expected = np.take_along_axis(logp_TV, item.candidate_ids.clip(0), 1)
        pairs.append((result.candidate_logprobs, np.where(item.candidate_ids == PAD_ID, np.nan, expected)))
    got, wanted = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    return float(np.where(np.isnan(got) & np.isnan(wanted), 0.0, np.abs(got - wanted)).max())


def _tokenizers(name: str, compared: str, told: list[str]) -> Finding:
    return Finding(name, f"{compared}: {'; '.join(told)}" if told else compared, len(told), 0, "differences")


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


def _with_another_id(exam: Examination, position: int) -> ScoreItem:
    """The item with another id at one place of its completion; candidates as they were."""
    completion = exam.item.completion_ids.copy()
    completion[position] = (completion[position] + 1) % exam.info.tokenizer.vocab_size
    return replace(exam.item, completion_ids=completion)


def _has_rows(exam: Examination) -> bool:
    """Whether a row shows more than its own token."""
    return bool(exam.item.top_k) or exam.item.candidate_ids is not None


def _rows_from(result: ScoreResult, first: int) -> ScoreResult:
    return replace(
        result,
        sampled_logprobs=result.sampled_logprobs[first:],
        top_logprobs=result.top_logprobs[first:],
        candidate_logprobs=result.candidate_logprobs[first:],
        entropy=None if result.entropy is None else result.entropy[first:],
    )


def _short(number: float) -> str:
    return f"{number:g}"
