"""How close teachers are to a student, by token and by position on the student's own rollouts, and which is closest.

On-policy distillation asks a teacher about the student's prefixes, so that a teacher is worth what it can say there:
pick by closeness, not by score ("The Many Faces of On-Policy Distillation").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from protos.records import Chat, Int32, ScoreItem
from student_trainer.privileged import privileged_of
from student_trainer.probes.closeness import MEASURES, Float64, summary, token_mean, token_measures
from student_trainer.probes.collection import Collection, Question
from student_trainer.probes.draw import Line, Panel, png
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.rollouts import Rollouts
from student_trainer.probes.run import Subjects
from student_trainer.run_folder import Row
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt

DISTANCE = "reverse_kl_listed"
"""What ranks: the divergence that on-policy distillation descends, exact over both lists at each of the student's
prefixes. The sampled estimate reverse_kl is unbiased for large vocabularies too, and takes many more rollouts to tell
two teachers apart."""

SHOWN = {
    "reverse_kl_listed": "KL(s‖t) ≥",
    "reverse_kl": "sampled",
    "forward_kl_listed": "KL(t‖s) ≥",
    "overlap_ratio": "overlap",
    "overlap_student_mass": "s on it",
    "overlap_teacher_mass": "t on it",
    "entropy_gap": "H(s)-H(t)",
}
"""Columns of the table, by measure; s is the student and t the teacher."""


class OverlapProbe:
    """See `run.Probe`; K is the loss's top_k, or less where a model gives less."""

    name = "overlap"

    def __init__(self, subjects: Subjects, top_k: int) -> None:
        self._student, self._teachers = subjects.student, subjects.teachers
        limits = [n for one in subjects.teachers for n in (one.info.max_top_k, one.info.max_candidates)]
        self._top_k = min(top_k, subjects.student.max_top_k, *limits)
        self._rollouts = Rollouts(subjects)
        self._privileged = subjects.settings.config.privileged
        self._told = privileged_of(self._privileged) if self._privileged else None

    @property
    def identity(self) -> Row:
        """See `run.Probe`."""
        told = self._privileged.model_dump(mode="json") if self._privileged else None
        return {"top_k": self._top_k, "privileged": told}

    def collect(self, problems: Sequence[Problem], collection: Collection) -> None:
        """See `run.Probe`."""
        texts = self._rollouts.texts(problems, collection)
        for index in range(len(self._teachers)):
            # Both models score each token.
            asked = [Question(f"teacher/{index}/{p.id}", (index, p, ids), 2 * len(ids)) for p, ids in texts]
            collection.answers(asked, self._compare)

    def is_done(self, problem: Problem, rows: dict[str, Row]) -> bool:
        """See `run.Probe`."""
        return all(f"teacher/{index}/{problem.id}" in rows for index in range(len(self._teachers)))

    def result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> Row:
        """See `run.Probe`."""
        measured = [
            [
                {name: np.asarray(rows[f"teacher/{index}/{p.id}"][name], np.float64) for name in MEASURES}
                for p in problems
            ]
            for index in range(len(self._teachers))
        ]
        found = [
            {"url": teacher.url, "model": teacher.info.model, **summary(rollouts)}
            for teacher, rollouts in zip(self._teachers, measured, strict=True)
        ]
        order = sorted(range(len(found)), key=lambda index: found[index][DISTANCE]["mean"])
        closest = measured[order[0]]
        for index in order[1:]:
            further: list[Float64] = [
                other[DISTANCE] - one[DISTANCE] for one, other in zip(closest, measured[index], strict=True)
            ]
            found[index]["further_than_closest"] = token_mean(further).figures()
        ranked = [found[index] for index in order]
        return {"top_k": self._top_k, "teachers": ranked, "verdict": verdict(ranked)}

    def tables(self, result: Row) -> Sequence[RenderableType]:
        """See `run.Probe`."""
        title = (
            f"Closest first, on {result['num_problems']} of the student's rollouts (nats a token, K = {self._top_k})"
        )
        table = Table(title=title)
        table.add_column("teacher", overflow="fold", min_width=20)
        for name in SHOWN.values():
            table.add_column(name, justify="right")
        for teacher in result["teachers"]:
            table.add_row(teacher["url"], *(_shown(teacher.get(name)) for name in SHOWN))
        return [table]

    def plot(self, result: Row) -> bytes:
        """See `run.Probe`."""
        tenths = [tenth / 10 + 0.05 for tenth in range(10)]
        panels = [
            Panel(
                label,
                [
                    Line(f"{teacher['model']} ({teacher['url']})"[-40:], tenths, teacher[name]["by_decile"])
                    for teacher in result["teachers"]
                ],
                x_label="position in the rollout",
            )
            for name, label in (("teacher_advantage", "log q - log p, nats"), ("overlap_ratio", "overlap ratio"))
        ]
        return png(panels)

    def _compare(self, texts: Sequence[tuple[int, Problem, Int32]]) -> list[Row]:
        """Each model at the other's most likely ids, on the same tokens; all of one teacher."""
        teacher = self._teachers[texts[0][0]]
        plain = [self._item(problem, ids, None) for _, problem, ids in texts]
        student_tops = [result.top_ids for result in self._student.score(plain)]
        has_entropy = "entropy" in teacher.info.supports
        asked = [
            self._as_told(self._item(problem, ids, top, entropy=has_entropy), problem)
            for (_, problem, ids), top in zip(texts, student_tops, strict=True)
        ]
        teacher_results = teacher.score(asked)
        student_results = self._student.score(
            [
                self._item(problem, ids, result.top_ids, entropy=True)
                for (_, problem, ids), result in zip(texts, teacher_results, strict=True)
            ]
        )
        return [
            {
                "problem": problem.id,
                "teacher": teacher.url,
                NUM_TOKENS: 2 * len(ids),
                **{name: values.tolist() for name, values in token_measures(student, result).items()},
            }
            for (_, problem, ids), student, result in zip(texts, student_results, teacher_results, strict=True)
        ]

    def _as_told(self, item: ScoreItem, problem: Problem) -> ScoreItem:
        """The item as the run will ask it of a teacher: with what the config tells it."""
        if self._told is None:
            return item
        return replace(item, prompt=Chat(problem.messages), privileged=self._told(problem))

    def _item(self, problem: Problem, ids: Int32, wanted: Int32 | None, *, entropy: bool = False) -> ScoreItem:
        return ScoreItem(
            render_prompt(self._student.tokenizer, problem.messages),
            ids,
            temperature=self._rollouts.params.temperature,
            top_k=self._top_k,
            candidate_ids=wanted,
            entropy=entropy,
        )


def verdict(ranked: Sequence[Row]) -> list[str]:
    """Which teacher is closest, and how sure that is."""
    first = ranked[0]
    kl = first[DISTANCE]
    sentences = [
        f"Closest is {first['url']}: KL(student‖teacher) at least {kl['mean']:.4f} nats a token (95 % interval "
        f"{kl['low']:.4f} to {kl['high']:.4f})."
    ]
    for other in ranked[1:]:
        gap = other["further_than_closest"]
        is_sure = gap["low"] > 0
        sentences.append(
            f"{other['url']} is {gap['mean']:.4f} nats a token further (paired 95 % interval {gap['low']:.4f} to "
            f"{gap['high']:.4f})" + ("." if is_sure else ": these rollouts cannot tell the two apart.")
        )
    return sentences


def _shown(measure: Row | None) -> str:
    return "-" if measure is None else f"{measure['mean']:.4f}"
