"""What a student's prefix does to a teacher: it goes on from its own answer and from the student's, cut at the same
share of their tokens; all greedy. The first mechanism of "The Many Faces of On-Policy Distillation".

Cut at its own answer, a teacher should end as it does alone: the control. What is then left of a difference is the
student's writing. An answer that does not keep the form may be a right one that cannot be read, so accuracy is also
taken among the answers that can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from protos.records import GenerateItem, Int32, ScoreItem
from student_trainer.config import ConfigError
from student_trainer.probes.answers import NOTHING, answer_row, percent, points, summary
from student_trainer.probes.closeness import Float64, token_mean
from student_trainer.probes.collection import Collection, Question
from student_trainer.probes.draw import Bar, Line, Panel, png
from student_trainer.probes.errors import error_finder
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.paired import Paired
from student_trainer.probes.revision import candidates, revision_mass, word_ids
from student_trainer.probes.run import Subjects
from student_trainer.probes.students import text_of
from student_trainer.rollout.base import SamplingParams
from student_trainer.run_folder import Row
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt

CONTROL_MAY_DIFFER = 0.02
"""Between the teacher alone and on its own prefix: greedy decoding in other batches rounds otherwise now and then. A
larger difference says that the engine, not the prefix, changes answers."""

OWNERS = ("own", "student")

POSITIONS = ("own", "student_without_error", "student_with_error")
"""Where revision mass is taken: in the teacher's own answers, and in the student's before and after the first error
(for a task that cannot tell where: in its right and in its wrong answers)."""


@dataclass(frozen=True)
class Prefix:
    """An answer's first tokens."""

    problem: Problem
    ids: Int32


class PrefixProbe:
    """See `run.Probe`; `cuts` are shares of an answer, between 0 and 1."""

    name = "prefix"

    def __init__(self, subjects: Subjects, cuts: Sequence[float]) -> None:
        if not cuts or not all(0 < cut < 1 for cut in cuts) or list(cuts) != sorted(set(cuts)):
            raise ConfigError(f"--cut is {list(cuts)}: give shares of an answer between 0 and 1, each once, in order")
        self._cuts = tuple(cuts)
        self._teacher, self._student, self._task = subjects.teacher, subjects.student, subjects.task
        self._max_new_tokens = subjects.settings.max_new_tokens
        self._temperature = subjects.settings.config.rollout.temperature
        self._hedges = subjects.settings.config.watch.hedges
        self._revision_ids = word_ids(self._hedges, subjects.student.tokenizer)
        self._first_error = error_finder(subjects.settings.config.task)

    @property
    def identity(self) -> Row:
        """See `run.Probe`."""
        return {"cuts": list(self._cuts), "hedges": list(self._hedges)}

    def collect(self, problems: Sequence[Problem], collection: Collection) -> None:
        """See `run.Probe`."""
        whole = {
            "student": collection.answers(
                [Question(f"student/{p.id}", p, self._max_new_tokens) for p in problems], self._ask_student
            ),
            "own": collection.answers(
                [Question(f"alone/{p.id}", Prefix(p, NOTHING), self._max_new_tokens) for p in problems], self._go_on
            ),
        }
        for owner in OWNERS:
            texts = [Prefix(p, _ids(row)) for p, row in zip(problems, whole[owner], strict=True)]
            scored = [Question(f"revision/{owner}/{text.problem.id}", text, len(text.ids)) for text in texts]
            collection.answers(scored, self._revise)
            for cut in self._cuts:
                prefixes = [Prefix(text.problem, text.ids[: int(cut * len(text.ids))]) for text in texts]
                asked = [
                    Question(_cut_key(owner, cut, one.problem), one, self._max_new_tokens - len(one.ids))
                    for one in prefixes
                ]
                collection.answers(asked, self._go_on)

    def is_done(self, problem: Problem, rows: dict[str, Row]) -> bool:
        """See `run.Probe`."""
        keys = [f"student/{problem.id}", f"alone/{problem.id}", *(f"revision/{owner}/{problem.id}" for owner in OWNERS)]
        keys += [_cut_key(owner, cut, problem) for owner in OWNERS for cut in self._cuts]
        return all(key in rows for key in keys)

    def result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> Row:
        """See `run.Probe`."""
        alone = [rows[f"alone/{problem.id}"] for problem in problems]
        cuts = [self._cut_result(problems, rows, cut) for cut in self._cuts]
        result = {
            "tells_errors_apart": "exactly" if self._first_error else "by the student's final answer",
            "alone": summary(alone),
            "student_alone": summary([rows[f"student/{problem.id}"] for problem in problems]),
            "cuts": cuts,
            "revision_mass": self._revision_result(problems, rows),
        }
        return {**result, "verdict": verdict(result)}

    def tables(self, result: Row) -> Sequence[RenderableType]:
        """See `run.Probe`."""
        table = Table(title=f"The teacher on {result['num_problems']} problems")
        for name in ("cut", "own", "student's", "points", "95 % interval", "p", "lost, won", "read", "right of read"):
            table.add_column(name, justify="right")
        for name in ("after error", "before"):
            table.add_column(name, justify="right")
        alone = result["alone"]
        of_read = percent(alone["accuracy_well_formed"])
        table.add_row("alone", percent(alone["accuracy"]), *[""] * 5, percent(alone["well_formed"]), of_read)
        for cut in result["cuts"]:
            student, paired = cut["student"], cut["paired"]
            low, high = paired["interval"]
            table.add_row(
                f"{cut['cut']:g}",
                percent(cut["own"]["accuracy"]),
                percent(student["accuracy"]),
                points(paired["difference"]),
                f"{points(low)} to {points(high)}",
                f"{paired['p_value']:.2g}",
                f"{paired['right_to_wrong']}, {paired['wrong_to_right']}",
                percent(student["well_formed"]),
                percent(student["accuracy_well_formed"]),
                percent(cut["with_error"]["student"]["accuracy"]),
                percent(cut["without_error"]["student"]["accuracy"]),
            )
        mass = Table(title="The teacher's mass on revision tokens")
        mass.add_column("where")
        mass.add_column("mass", justify="right")
        mass.add_column("95 % interval", justify="right")
        for name, one in result["revision_mass"].items():
            if one:
                mass.add_row(name.replace("_", " "), f"{one['mean']:.4f}", f"{one['low']:.4f} to {one['high']:.4f}")
        return [table, mass]

    def plot(self, result: Row) -> bytes:
        """See `run.Probe`."""
        cuts = [cut["cut"] for cut in result["cuts"]]

        def line(label: str, found: Sequence[Row]) -> Line:
            low, high = zip(*(one["interval"] for one in found), strict=True)
            return Line(label, cuts, [one["accuracy"] for one in found], (low, high))

        lines = [
            Line("alone", cuts, [result["alone"]["accuracy"]] * len(cuts)),
            line("on its own prefix", [cut["own"] for cut in result["cuts"]]),
            line("on the student's", [cut["student"] for cut in result["cuts"]]),
            line("... with an error", [cut["with_error"]["student"] for cut in result["cuts"]]),
            line("... without", [cut["without_error"]["student"] for cut in result["cuts"]]),
        ]
        bars = [
            Bar(name.replace("_", " "), one["mean"], (one["low"], one["high"]))
            for name, one in result["revision_mass"].items()
            if one
        ]
        panels = [Panel("accuracy", lines, x_label="share of the answer that was given")]
        return png([*panels, Panel("mass on revision tokens", bars=bars)] if bars else panels)

    def _cut_result(self, problems: Sequence[Problem], rows: dict[str, Row], cut: float) -> Row:
        own, student = ([rows[_cut_key(owner, cut, p)] for p in problems] for owner in OWNERS)
        has_error = [self._has_error(p, row, rows) for p, row in zip(problems, student, strict=True)]
        groups = {"with_error": True, "without_error": False}
        return {
            "cut": cut,
            **_pair(own, student),
            **{
                name: _pair(
                    *(
                        [row for row, has in zip(found, has_error, strict=True) if has is wanted]
                        for found in (own, student)
                    )
                )
                for name, wanted in groups.items()
            },
        }

    def _has_error(self, problem: Problem, row: Row, rows: dict[str, Row]) -> bool:
        """Whether the student's prefix that `row` goes on from holds an error."""
        if self._first_error is None:
            return not rows[f"student/{problem.id}"]["is_right"]
        return self._first_error(problem, text_of(self._student.tokenizer, _prefix_ids(row))) is not None

    def _revision_result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> dict[str, dict[str, float] | None]:
        found: dict[str, list[Float64]] = {name: [] for name in POSITIONS}
        if self._revision_ids:
            for problem in problems:
                found["own"].append(_mass(rows[f"revision/own/{problem.id}"]))
                mass_T = _mass(rows[f"revision/student/{problem.id}"])
                num_right = self._num_right(problem, rows[f"student/{problem.id}"])
                found["student_without_error"].append(mass_T[:num_right])
                found["student_with_error"].append(mass_T[num_right:])
        means = {name: [one for one in values if len(one)] for name, values in found.items()}
        return {name: token_mean(values).figures() if values else None for name, values in means.items()}

    def _num_right(self, problem: Problem, row: Row) -> int:
        """How many positions of the student's answer are predicted from a prefix without an error."""
        ids = _ids(row)
        if self._first_error is None:
            return len(ids) if row["is_right"] else 0
        for num in range(len(ids) + 1):
            if self._first_error(problem, text_of(self._student.tokenizer, ids[:num])) is not None:
                return num
        return len(ids)

    def _ask_student(self, problems: Sequence[Problem]) -> list[Row]:
        params = SamplingParams(self._max_new_tokens, temperature=0.0)
        rollouts = self._student.sample(problems, params, seeds=[0] * len(problems))
        return [self._row(Prefix(r.problem, NOTHING), r.completion_ids, r.is_finished) for r in rollouts]

    def _go_on(self, prefixes: Sequence[Prefix]) -> list[Row]:
        """The teacher's greedy continuations; the whole answer has one budget, however much of it is given."""
        tokenizer = self._student.tokenizer
        items = [
            GenerateItem(
                render_prompt(tokenizer, prefix.problem.messages),
                prefix_ids=prefix.ids,
                max_new_tokens=self._max_new_tokens - len(prefix.ids),
                temperature=0.0,
            )
            for prefix in prefixes
        ]
        samples = [result.samples[0] for result in self._teacher.generate(items)]
        return [
            self._row(prefix, sample.token_ids, sample.finish_reason == "stop")
            for prefix, sample in zip(prefixes, samples, strict=True)
        ]

    def _row(self, prefix: Prefix, ids: Int32, is_finished: bool) -> Row:
        tokenizer = self._student.tokenizer
        return answer_row(self._task, tokenizer, prefix.problem, ids, is_finished=is_finished, prefix_ids=prefix.ids)

    def _revise(self, texts: Sequence[Prefix]) -> list[Row]:
        """The teacher's mass on revision tokens before each token of whole answers."""
        tokenizer = self._student.tokenizer
        items = [
            ScoreItem(
                render_prompt(tokenizer, text.problem.messages),
                text.ids,
                temperature=self._temperature,
                candidate_ids=candidates(self._revision_ids, len(text.ids)),
            )
            for text in texts
        ]
        return [
            {
                "problem": text.problem.id,
                NUM_TOKENS: len(text.ids),
                "revision_mass": revision_mass(result.candidate_logprobs).tolist(),
            }
            for text, result in zip(texts, self._teacher.score(items), strict=True)
        ]


def verdict(result: Row) -> list[str]:
    """What the figures say, in sentences; of the cut where the student's prefix matters most."""
    worst = min(result["cuts"], key=lambda cut: cut["paired"]["difference"])
    paired, own, student = worst["paired"], worst["own"], worst["student"]
    low, high = paired["interval"]
    sentences = [
        f"At {worst['cut']:g} of the answer the teacher is right on {percent(own['accuracy'])} from its own prefix and "
        f"on {percent(student['accuracy'])} from the student's: {points(paired['difference'])} points (95 % interval "
        f"{points(low)} to {points(high)}; McNemar's exact test p = {paired['p_value']:.2g}); among well-formed "
        f"answers {percent(own['accuracy_well_formed'])} and {percent(student['accuracy_well_formed'])}."
    ]
    alone = result["alone"]["accuracy"]
    control = max(abs(cut["own"]["accuracy"] - alone) for cut in result["cuts"])
    if control > CONTROL_MAY_DIFFER:
        sentences.append(
            f"The control is off: on its own prefixes the teacher is up to {100 * control:.1f} points from alone "
            f"({percent(alone)}), so the engine changes answers by itself."
        )
    return sentences


def _pair(own: Sequence[Row], student: Sequence[Row]) -> Row:
    right = ([row["is_right"] for row in rows] for rows in (own, student))
    return {"own": summary(own), "student": summary(student), "paired": Paired.of(*right).figures()}


def _cut_key(owner: str, cut: float, problem: Problem) -> str:
    return f"{owner}/{cut:g}/{problem.id}"


def _ids(row: Row) -> Int32:
    return np.asarray(row["token_ids"], np.int32)


def _prefix_ids(row: Row) -> Int32:
    return np.asarray(row["prefix_ids"], np.int32)


def _mass(row: Row) -> Float64:
    return np.asarray(row["revision_mass"], np.float64)
