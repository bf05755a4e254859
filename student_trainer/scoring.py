"""From rollouts to a teacher and back: the handshake, the request, and arrays aligned with the rollouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Self, TypeVar

import numpy as np
import torch

from protos import contract
from protos.credentials import Tls
from protos.fingerprint import UNKNOWN, SpellingVocabulary, differences, spelling_differences
from protos.records import (
    Chat,
    GenerateItem,
    GenerateResult,
    Int32,
    Privileged,
    ScoreItem,
    ScoreResult,
    TokenizerFingerprint,
)
from protos.service import Detokenizer
from protos.together import together
from student_trainer.client_thread import ClientThread
from student_trainer.distributed import by_main
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.rollout.generated import generate_item
from student_trainer.steady_teacher import SteadyTeacher
from student_trainer.tasks import Problem
from student_trainer.teacher_identity import TeacherMismatch
from student_trainer.weights_sync import Carry, WeightsSync, stream

Item = TypeVar("Item", ScoreItem, GenerateItem)


@dataclass(frozen=True)
class Wanted:
    """What a loss needs of the teacher at each completion token.

    Attributes:
        teacher_top_k: how many of the teacher's own most likely ids; 0 for none.
        student_top_k: how many of the student's most likely ids to score; 0 for none.
        vocab_size: V, to score every id in place of the student's, in their order; 0 not to.
        temperature: of the student's log-probs in the loss; None when no loss compares them.
        entropy: the teacher's entropy, from those that can give it.
    """

    teacher_top_k: int = 0
    student_top_k: int = 0
    vocab_size: int = 0
    temperature: float | None = None
    entropy: bool = False


class Scorer:
    """A connection to one teacher, for a synchronous caller.

    Args:
        url: as `protos.client.connect` takes it.
        temperature: of the log-probs, the same as the student's.
        timeout_s: for one call of `score`, in seconds.
        max_wait_s: how long that call waits for a teacher that is gone; see `SteadyTeacher`.
        tls: the files of a grpcs or https teacher; None for the defaults of `connect`.
        name: which of the server's teachers; None is its first.
        privileged: what the teacher sees of a problem and the student does not; None for nothing.
        carry: how weights get to it.

    Attributes:
        info: what the teacher said of itself.

    Raises:
        TeacherError: the teacher could not be asked.
    """

    def __init__(
        self,
        url: str,
        *,
        temperature: float,
        timeout_s: float,
        max_wait_s: float = 0.0,
        tls: Tls | None = None,
        name: str | None = None,
        privileged: Callable[[Problem], Privileged] | None = None,
        carry: Carry = stream,
    ) -> None:
        self._url = url
        self._temperature = temperature
        self._timeout_s = timeout_s
        self._privileged = privileged
        self._client = ClientThread(url, tls, name=name)
        self.info = self._client.info
        self._steady = SteadyTeacher(self._client.teacher, self.info, max_wait_s)
        self._sync = WeightsSync(self._client, carry=carry, timeout_s=timeout_s)

    def handshake(
        self,
        student: TokenizerFingerprint,
        wanted: Wanted,
        max_context_tokens: int,
        *,
        tokenizer: SpellingVocabulary,
    ) -> None:
        """Refuses a teacher that cannot score this student.

        Args:
            tokenizer: the student's, for a teacher that cannot say which it has.

        Raises:
            TeacherMismatch: tokenizers differ, K or context is too small, or a temperature is not exact there.
        """
        info = self.info
        if info.tokenizer == UNKNOWN and isinstance(self._client.teacher, Detokenizer):
            problems = self._client.wait(spelling_differences(self._client.teacher, tokenizer))
        else:
            problems = differences(info.tokenizer, student)
        if wanted.vocab_size and info.tokenizer.vocab_size != student.vocab_size:
            problems.append(
                f"the loss compares whole vocabularies: the student's output has {student.vocab_size} rows, "
                f"the teacher's {info.tokenizer.vocab_size}"
            )
        for name, asked, limit in (
            ("teacher's top-K", wanted.teacher_top_k, info.max_top_k),
            ("student's ids a position", wanted.student_top_k, info.max_candidates),
            ("ids of the whole vocabulary", wanted.vocab_size, info.max_candidates),
            ("prompt, privileged information and completion tokens", max_context_tokens, info.max_context_tokens),
        ):
            if asked > limit:
                problems.append(f"{name}: {asked} needed, the teacher takes at most {limit}")
        if wanted.vocab_size:
            problems += contract.too_old(
                info.contract_version, contract.SHARED_CANDIDATES, "ids of the whole vocabulary"
            )
        if (wanted.student_top_k or wanted.vocab_size) and "candidates" not in info.supports:
            whose = "every id" if wanted.vocab_size else "the student's ids"
            problems.append(f"the loss needs scores at {whose}, which this teacher cannot give")
        if wanted.temperature not in (None, self._temperature):
            problems.append(
                f"the student's log-probs are taken at temperature {wanted.temperature}, the teacher is asked at "
                f"{self._temperature}: they must be equal"
            )
        if self._temperature != 1 and not info.exact_temperature:
            problems.append(f"temperature {self._temperature} is not exact on this teacher, only 1.0 is")
        if problems:
            raise TeacherMismatch(f"teacher {self._url} does not fit this student:\n  " + "\n  ".join(problems))

    def score(self, rollouts: Sequence[Rollout], wanted: Wanted) -> list[ScoreResult]:
        """One result a rollout, in order; as many requests at once as the teacher's limit of items needs.

        Raises:
            TeacherError: any item failed.
            TeacherGone, TeacherMismatch: see `SteadyTeacher.score`.
        """
        return self.start(rollouts, wanted).result()

    def start(self, rollouts: Sequence[Rollout], wanted: Wanted) -> Future[list[ScoreResult]]:
        """`score`, begun in the client's thread while the caller goes on."""
        items = [self._item(rollout, wanted) for rollout in rollouts]
        return self._client.start(self._score(self._requests(items)))

    def write(
        self,
        problems: Sequence[Problem],
        params: SamplingParams,
        *,
        seeds: Sequence[int],
        prompts: Sequence[Int32] | None = None,
    ) -> Future[list[GenerateResult]]:
        """Begins the teacher's own completions: one result of `params.num_samples` samples a problem, in order.

        Args:
            seeds: one for each problem.
            prompts: the problems' ids, for a teacher of the same tokenizer that is told nothing more; without them the
                teacher's own chat template is used.

        Raises:
            TeacherError, TeacherGone, TeacherMismatch: by the result; see `score`.
        """
        items = [
            generate_item(
                Chat(problem.messages) if prompts is None or self._privileged else prompts[place],
                params,
                seed,
                self._privileged(problem) if self._privileged else None,
            )
            for place, (problem, seed) in enumerate(zip(problems, seeds, strict=True))
        ]
        return self._client.start(self._write(self._requests(items)))

    def send_weights(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Has the teacher score with these weights from here on, and no other; returns their version.

        Every rank calls it; rank 0 sends its weights for all.

        Raises:
            TeacherError: see `WeightsSync.send`.
            TeacherGone, TeacherMismatch: see `SteadyTeacher.take_weights`.
        """
        send = partial(self._sync.send, weights)
        version = by_main(lambda: self._client.wait(self._steady.take_weights(send)))
        self._steady.expect(version)
        return version

    def take_waited_s(self) -> float:
        """See `SteadyTeacher.take_waited_s`."""
        return self._steady.take_waited_s()

    def close(self) -> None:
        """Closes the connection and its thread."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _requests(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        limit = self.info.max_items
        return [items[start : start + limit] for start in range(0, len(items), limit)]

    async def _write(self, requests: Sequence[Sequence[GenerateItem]]) -> list[GenerateResult]:
        replies = await together(self._steady.generate(r, timeout_s=self._timeout_s) for r in requests)
        return [result for results in replies for result in results]

    async def _score(self, requests: Sequence[Sequence[ScoreItem]]) -> list[ScoreResult]:
        replies = await together(self._steady.score(r, timeout_s=self._timeout_s) for r in requests)
        return [result for results in replies for result in results]

    def _item(self, rollout: Rollout, wanted: Wanted) -> ScoreItem:
        privileged = self._privileged(rollout.problem) if self._privileged else None
        candidate_ids = None
        if wanted.vocab_size:
            candidate_ids = np.arange(wanted.vocab_size, dtype=np.int32)[None]
        elif wanted.student_top_k:
            candidate_ids = rollout.top_ids[:, : wanted.student_top_k]
        return ScoreItem(
            # Without privileged information the ids themselves are sent, so that both models read the same prompt.
            prompt=rollout.prompt_ids if privileged is None else Chat(rollout.problem.messages),
            completion_ids=rollout.completion_ids,
            temperature=self._temperature,
            top_k=wanted.teacher_top_k,
            candidate_ids=candidate_ids,
            entropy=wanted.entropy and "entropy" in self.info.supports,
            privileged=privileged,
        )
