"""Supervised fine-tuning: the completions are the problems' references."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from protos.records import Int32
from student_trainer.collate import Batch, collate
from student_trainer.lm_head import check_packing
from student_trainer.losses import log_probs
from student_trainer.seeds import pick
from student_trainer.stages.base import Collected, Metrics
from student_trainer.student import Student
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt


class Sft:
    """Negative log-likelihood of each reference and the id that ends an assistant's turn.

    Args:
        packing: see `SftStage.packing`.

    Raises:
        ValueError: a problem has no reference, or the model cannot keep packed texts apart.
    """

    def __init__(
        self,
        student: Student,
        problems: Sequence[Problem],
        *,
        problems_per_step: int,
        seed: int,
        packing: bool = False,
    ) -> None:
        without = next((problem.id for problem in problems if problem.reference is None), None)
        if without is not None:
            raise ValueError(f"problem {without} has no reference, and sft learns from references")
        if packing:
            check_packing(student.model)
        self._packing = packing
        self._student = student
        self._problems = problems
        self._problems_per_step = problems_per_step
        self._seed = seed

    def collect(self, step: int) -> Collected:
        """The references of step s's problems."""
        problems = pick(self._problems, self._problems_per_step, step, self._seed)
        prompts = [render_prompt(self._student.tokenizer, problem.messages) for problem in problems]
        batch = collate(prompts, [self._reference_ids(problem) for problem in problems])
        return Collected(batch.packed() if self._packing else batch)

    def loss(self, logits_BTV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """-log p of each completion token, in nats."""
        logp_BTV = log_probs(logits_BTV, temperature=1.0)
        return -logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0]

    def watch(self, logits_BTV: torch.Tensor, batch: Batch) -> Metrics:
        """Share of completion tokens that the student ranks first."""
        hits_BT = logits_BTV.argmax(-1) == batch.completion_ids_BT
        return {"token_accuracy": float(hits_BT[batch.mask_BT].float().mean())}

    def close(self) -> None:
        """Nothing to free."""

    def _reference_ids(self, problem: Problem) -> Int32:
        ids = self._student.tokenizer(problem.reference, add_special_tokens=False).input_ids
        return np.asarray([*ids, self._student.turn_end_id], np.int32)
