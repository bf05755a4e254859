"""The same rows asked for again, another way: what surrounds an item, what is cached, where its context is cut."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from protos.records import PrivilegedIds, ScoreItem, ScoreResult
from teacher_server.check.examination import Examination, Finding, largest_difference, row_differences


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
    difference = row_differences(exam.alone, result)[: changed_at + 1]
    compared = "rows up to a completion token's own, with that token and with another"
    return exam.found("no row sees its own token", compared, float(difference.max()) if _has_rows(exam) else None)


async def sees_the_token_before(exam: Examination) -> Finding:
    """The row behind a changed completion token: it must change."""
    changed_at = (len(exam.item.completion_ids) - 1) // 2
    name, compared = "rows see the token before", "the row after a completion token, with that token and with another"
    if not _has_rows(exam) or len(exam.item.completion_ids) < 2:
        return Finding(name, compared, None, 0, "rows unchanged")
    [result] = await exam.score(_with_another_id(exam, changed_at))
    unchanged = row_differences(exam.alone, result)[changed_at + 1] == 0
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
