"""Completions that the teacher writes for the student to learn from, as GKD mixes them in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from protos.records import Int32
from student_trainer.collate import Batch, collate
from student_trainer.lm_head import completion_hidden, logit_chunks
from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.rollout.generated import rollout_of
from student_trainer.scoring import Scorer
from student_trainer.student import Student
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt


class TeacherSampler(Sampler):
    """A `Sampler` whose completions and log-probs are the teacher's; the most likely ids are the student's there.

    Args:
        scorer: the connection to the teacher, which has the student's tokenizer; its owner closes it.
        micro_batch_size: sequences in one forward pass of the student.
    """

    def __init__(self, scorer: Scorer, student: Student, *, micro_batch_size: int) -> None:
        self._scorer = scorer
        self._student = student
        self._micro_batch_size = micro_batch_size

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        """See `rollout.base.Sampler`; all come together, since the student reads them in one batch.

        Raises:
            TeacherError, TeacherGone, TeacherMismatch: see `Scorer.write`.
        """
        prompts = [render_prompt(self._student.tokenizer, problem.messages) for problem in problems]
        results = self._scorer.write(problems, params, seeds=seeds, prompts=prompts).result()
        written = [
            (problem, prompt, sample)
            for problem, prompt, result in zip(problems, prompts, results, strict=True)
            for sample in result.samples
        ]
        batch = collate([prompt for _, prompt, _ in written], [sample.token_ids for *_, sample in written])
        tops = most_likely_ids(self._student, batch, params.top_ids, self._micro_batch_size)
        yield {
            place: rollout_of(problem, prompt, sample, top_TK)
            for place, ((problem, prompt, sample), top_TK) in enumerate(zip(written, tops, strict=True))
        }

    def close(self) -> None:
        """Nothing to free."""


@torch.no_grad()
def most_likely_ids(student: Student, batch: Batch, num_ids: int, micro_batch_size: int) -> list[Int32]:
    """The student's `num_ids` most likely ids at each completion token, int32 [T, K] for each sequence."""
    model, rows = student.model, []
    was_training = model.training
    model.eval()
    try:
        for micro in (part.to(model.device) for part in batch.split(micro_batch_size)):
            hidden_ND = completion_hidden(model, micro)
            chunks = [
                logits_BTV[0].topk(num_ids, -1).indices.cpu().numpy().astype(np.int32)
                for logits_BTV, _ in logit_chunks(model, student.head, hidden_ND, micro)
            ]
            ends = micro.mask_BT.sum(-1).cumsum(-1)[:-1].tolist()
            rows += np.split(np.concatenate(chunks), ends)
    finally:
        model.train(was_training)
    return rows
