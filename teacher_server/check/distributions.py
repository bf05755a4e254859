"""What must hold of any distribution: order and sum of the top-K, one log-prob an id, temperature."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from protos.records import PAD_ID
from teacher_server.check.examination import TEMPERATURE, Examination, Finding


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
