"""Rollouts from a teacher server that runs the student's weights, pushed to it before each batch.

The server's `Generate` gives the ids and their log-probs; the student's most likely ids come from a `Score` of the same
texts there, one prefill that the server's prefix cache shortens, so that the trainer runs no forward of its own for a
rollout. Both answers must carry the version that was pushed: nothing stale is used, and nobody else's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from protos.errors import Conflict
from protos.fingerprint import differences
from protos.records import (
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    Int32,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
)
from student_trainer.client_thread import ClientThread
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.scoring import TeacherMismatch
from student_trainer.student import Student
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt
from student_trainer.weights_sync import WeightsSync

Item = TypeVar("Item")
Result = TypeVar("Result", GenerateResult, ScoreResult)


class RemoteSampler:
    """Samples from the server at `url`, which serves the student's own architecture and takes its weights.

    Equal seeds give equal completions where the server's engine does (see `GenerateItem.seed`); its random streams are
    not those of the in-process sampler.

    Args:
        url: as `protos.client.connect` takes it; its token needs the scopes generate, score and admin.
        timeout_s: for one push of weights and for one batch, in seconds.

    Raises:
        TeacherMismatch: the server's tokenizer or limits do not fit the student.
        TeacherError: the server could not be asked.
    """

    def __init__(self, url: str, student: Student, *, max_context_tokens: int, timeout_s: float) -> None:
        self._model: PreTrainedModel = student.model
        self._tokenizer: PreTrainedTokenizerBase = student.tokenizer
        self._timeout_s = timeout_s
        self._client = ClientThread(url)
        info = self._client.info
        problems = differences(info.tokenizer, student.fingerprint)
        if max_context_tokens > info.max_context_tokens:
            problems.append(
                f"prompt and completion tokens: {max_context_tokens} needed, it takes {info.max_context_tokens}"
            )
        if problems:
            self._client.close()
            raise TeacherMismatch(f"rollout.url {url} does not fit this student:\n  " + "\n  ".join(problems))
        self._sync = WeightsSync(self._client, timeout_s=timeout_s)

    def sample(self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]) -> list[Rollout]:
        """See `rollout.base.Sampler`; the weights are those of now.

        Raises:
            PermissionDenied, InvalidRequest: the server does not take the student's weights.
            Conflict: somebody else has changed the server's weights meanwhile.
            TeacherError: the server failed.
        """
        self._sync.push(self._model)
        prompts = [render_prompt(self._tokenizer, problem.messages) for problem in problems]
        items = [
            GenerateItem(
                prompt,
                max_new_tokens=params.max_new_tokens,
                temperature=params.temperature,
                top_p=params.top_p,
                num_samples=params.num_samples,
                seed=seed,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        written = [
            (problem, prompt, sample)
            for problem, prompt, result in zip(problems, prompts, self._generated(items), strict=True)
            for sample in result.samples
        ]
        tops = self._top_ids([(prompt, sample.token_ids) for _, prompt, sample in written], params)
        return [_rollout(*one, top_TK) for one, top_TK in zip(written, tops, strict=True)]

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def _generated(self, items: Sequence[GenerateItem]) -> list[GenerateResult]:
        results: list[GenerateResult] = []
        for part in self._parts(items):
            request = GenerateRequest(part, min_weights_version=self._sync.version)
            results += self._client.wait(self._client.teacher.generate(request, timeout_s=self._timeout_s))
        return self._of_this_version(results)

    def _top_ids(self, texts: Sequence[tuple[Int32, Int32]], params: SamplingParams) -> list[Int32]:
        """int32 [T, K] for each prompt and completion."""
        if not params.top_ids:
            return [np.empty((len(ids), 0), np.int32) for _, ids in texts]
        results: list[ScoreResult] = []
        for part in self._parts([ScoreItem(prompt, ids, top_k=params.top_ids) for prompt, ids in texts]):
            request = ScoreRequest(part, min_weights_version=self._sync.version)
            results += self._client.wait(self._client.teacher.score(request, timeout_s=self._timeout_s))
        return [result.top_ids for result in self._of_this_version(results)]

    def _parts(self, items: Sequence[Item]) -> list[tuple[Item, ...]]:
        limit = self._client.info.max_items
        return [tuple(items[start : start + limit]) for start in range(0, len(items), limit)]

    def _of_this_version(self, results: list[Result]) -> list[Result]:
        for result in results:
            if result.weights_version != self._sync.version:
                raise Conflict(
                    f"{self._client.teacher.url} answered with weights of version {result.weights_version}; this run "
                    f"pushed version {self._sync.version}: give each run a rollout server of its own"
                )
        return results


def _rollout(problem: Problem, prompt_ids: Int32, sample: Sample, top_ids: Int32) -> Rollout:
    return Rollout(
        problem=problem,
        prompt_ids=prompt_ids,
        completion_ids=sample.token_ids,
        logprobs=sample.logprobs,
        top_ids=top_ids,
        is_finished=sample.finish_reason == "stop",
        text=sample.text,
    )
