"""Between rollouts and a server's `Generate`: one item a problem, one rollout a sample."""

from __future__ import annotations

import numpy as np

from protos.records import Chat, GenerateItem, Int32, Privileged, Sample
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.tasks import Problem


def generate_item(
    prompt: Int32 | Chat, params: SamplingParams, seed: int, privileged: Privileged | None = None
) -> GenerateItem:
    """What asks for one problem's completions."""
    return GenerateItem(
        prompt,
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        num_samples=params.num_samples,
        seed=seed,
        privileged=privileged,
    )


def rollout_of(problem: Problem, prompt_ids: Int32, sample: Sample, top_TK: Int32 | None = None) -> Rollout:
    """One completion; without `top_TK` its `top_ids` are empty."""
    return Rollout(
        problem=problem,
        prompt_ids=prompt_ids,
        completion_ids=sample.token_ids,
        logprobs=sample.logprobs,
        top_ids=np.empty((len(sample.token_ids), 0), np.int32) if top_TK is None else top_TK,
        is_finished=sample.finish_reason == "stop",
        text=sample.text,
    )
