"""The student's own rollouts of a probe's problems, as it would write them in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos.records import Int32
from student_trainer.probes.collection import Collection, Question
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.run import Subjects
from student_trainer.rollout.base import SamplingParams
from student_trainer.run_folder import Row
from student_trainer.seeds import rollout_seeds
from student_trainer.tasks import Problem


class Rollouts:
    """One rollout a problem, sampled by `params`; a function of the seed and the problem's place alone."""

    def __init__(self, subjects: Subjects) -> None:
        self._student, config = subjects.student, subjects.settings.config
        rollout = config.rollout
        self.params = SamplingParams(subjects.settings.max_new_tokens, rollout.temperature, rollout.top_p)
        seeds = rollout_seeds(config.seed, 0, len(subjects.problems))
        self._seeds = {problem.id: seed for problem, seed in zip(subjects.problems, seeds, strict=True)}

    def texts(self, problems: Sequence[Problem], collection: Collection) -> list[tuple[Problem, Int32]]:
        """Each problem with its rollout's ids, int32 [T]; raises BudgetSpent."""
        asked = [Question(f"student/{problem.id}", problem, self.params.max_new_tokens) for problem in problems]
        rows = collection.answers(asked, self._write)
        return [(p, np.asarray(row["token_ids"], np.int32)) for p, row in zip(problems, rows, strict=True)]

    def _write(self, problems: Sequence[Problem]) -> list[Row]:
        rollouts = self._student.sample(problems, self.params, [self._seeds[problem.id] for problem in problems])
        return [
            {
                "problem": rollout.problem.id,
                "token_ids": rollout.completion_ids.tolist(),
                NUM_TOKENS: len(rollout.completion_ids),
                "text": rollout.text,
                "is_finished": rollout.is_finished,
            }
            for rollout in rollouts
        ]
