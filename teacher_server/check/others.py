"""The same item asked of others: a replica, and the same model run by other code."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from protos.client import Teacher
from protos.fingerprint import differences
from protos.records import PAD_ID, Float32, Int32, ScoreItem, ScoreResult, TokenizerFingerprint
from teacher_server.check.examination import TEMPERATURE, Examination, Finding, largest_difference


class ReferenceModel(Protocol):
    """The same model run by other code."""

    @property
    def fingerprint(self) -> TokenizerFingerprint:
        """Of its tokenizer."""
        ...

    def logprobs(self, context_ids: Int32, completion_ids: Int32, temperature: float) -> Float32:
        """float32 [T, V] in nats: log_softmax(logits / temperature) for each completion token."""
        ...


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


def _short(number: float) -> str:
    return f"{number:g}"
