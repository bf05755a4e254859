"""Rollouts from a teacher server that runs the student's weights, pushed to it before each batch.

Of several ranks the first pushes for all, and each asks for the rollouts of its own problems.

The server's `Generate` gives the ids and their log-probs; the student's most likely ids come from a `Score` of the same
texts there, one prefill that the server's prefix cache shortens, so that the trainer runs no forward of its own for a
rollout. Both answers must carry the version that was pushed: nothing stale is used, and nobody else's weights.
Each problem is a request of its own, so that what has ended is handed over while the rest is being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from typing import TypeVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from protos.errors import Conflict
from protos.fingerprint import differences
from protos.records import (
    GenerateRequest,
    GenerateResult,
    Int32,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
)
from student_trainer.client_thread import ClientThread
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.rollout.generated import generate_item, rollout_of
from student_trainer.scoring import TeacherMismatch
from student_trainer.student import Student
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt
from student_trainer.weights_sync import Carry, WeightsSync, stream

Result = TypeVar("Result", GenerateResult, ScoreResult)


class RemoteSampler(Sampler):
    """Samples from the server at `url`, which serves the student's own architecture and takes its weights.

    Equal seeds give equal completions where the server's engine does (see `GenerateItem.seed`); its random streams are
    not those of the in-process sampler.

    Args:
        url: as `protos.client.connect` takes it; its token needs the scopes generate, score and admin.
        timeout_s: for one push of weights, and for each request of one batch, which are all sent at once; in seconds.
        carry: how weights get to the server.

    Attributes:
        info: what the server said of itself.

    Raises:
        TeacherMismatch: the server's tokenizer or limits do not fit the student.
        TeacherError: the server could not be asked.
    """

    def __init__(
        self, url: str, student: Student, *, max_context_tokens: int, timeout_s: float, carry: Carry = stream
    ) -> None:
        self._model: PreTrainedModel = student.model
        self._dtype = student.dtype
        self._tokenizer: PreTrainedTokenizerBase = student.tokenizer
        self._timeout_s = timeout_s
        self._client = ClientThread(url)
        info = self.info = self._client.info
        problems = differences(info.tokenizer, student.fingerprint)
        if max_context_tokens > info.max_context_tokens:
            problems.append(
                f"prompt and completion tokens: {max_context_tokens} needed, it takes {info.max_context_tokens}"
            )
        if problems:
            self._client.close()
            raise TeacherMismatch(f"rollout.url {url} does not fit this student:\n  " + "\n  ".join(problems))
        self._sync = WeightsSync(self._client, carry=carry, timeout_s=timeout_s)

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        """See `rollout.base.Sampler`; the weights are those of now, and the samples of a problem end together.

        Raises:
            PermissionDenied, InvalidRequest: the server does not take the student's weights.
            Conflict: somebody else has changed the server's weights meanwhile.
            TeacherError: the server failed.
        """
        self._sync.push(self._model, self._dtype)
        prompts = [render_prompt(self._tokenizer, problem.messages) for problem in problems]
        asked = [
            self._client.start(self._written(number * params.num_samples, *one, params))
            for number, one in enumerate(zip(problems, prompts, seeds, strict=True))
        ]
        try:
            for written in as_completed(asked):
                yield written.result()
        finally:
            for one in asked:
                one.cancel()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    async def _written(
        self, place: int, problem: Problem, prompt: Int32, seed: int, params: SamplingParams
    ) -> dict[int, Rollout]:
        """One problem's rollouts, the first of which has this place."""
        request = GenerateRequest((generate_item(prompt, params, seed),), min_weights_version=self._sync.version)
        [result] = self._of_this_version(await self._client.teacher.generate(request, timeout_s=self._timeout_s))
        tops = await self._top_ids(prompt, result.samples, params)
        pairs = zip(result.samples, tops, strict=True)
        return {place + s: rollout_of(problem, prompt, sample, top_TK) for s, (sample, top_TK) in enumerate(pairs)}

    async def _top_ids(self, prompt: Int32, samples: Sequence[Sample], params: SamplingParams) -> list[Int32]:
        """int32 [T, K] for each sample."""
        if not params.top_ids:
            return [np.empty((len(sample.token_ids), 0), np.int32) for sample in samples]
        limit = self._client.info.max_items
        items = [ScoreItem(prompt, sample.token_ids, top_k=params.top_ids) for sample in samples]
        results: list[ScoreResult] = []
        for start in range(0, len(items), limit):
            part = ScoreRequest(tuple(items[start : start + limit]), min_weights_version=self._sync.version)
            results += await self._client.teacher.score(part, timeout_s=self._timeout_s)
        return [result.top_ids for result in self._of_this_version(results)]

    def _of_this_version(self, results: list[Result]) -> list[Result]:
        for result in results:
            if result.weights_version != self._sync.version:
                raise Conflict(
                    f"{self._client.teacher.url} answered with weights of version {result.weights_version}; this run "
                    f"pushed version {self._sync.version}: give each run a rollout server of its own"
                )
        return results
