"""Whether a teacher's answers agree with themselves, with its replicas' and with a reference model's.

Every check is a function of an Examination and returns one Finding. None of them needs to know the model: they use what
must hold for any, such as that a row does not depend on tokens after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from protos.client import Teacher
from teacher_server.check.distributions import (
    padding,
    probabilities,
    sampled_as_candidate,
    temperature,
    top_k_as_candidates,
    top_k_is_highest,
    top_k_order,
)
from teacher_server.check.examination import Finding, examination
from teacher_server.check.others import (
    ReferenceModel,
    reference_logprobs,
    reference_tokenizer,
    replica_logprobs,
    replica_tokenizer,
)
from teacher_server.check.repeats import (
    after_a_cache_hit,
    again,
    in_a_batch,
    looks_ahead,
    privileged_ids,
    sees_the_token_before,
    split_elsewhere,
)

__all__ = ["CHECKS", "Finding", "check"]

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
