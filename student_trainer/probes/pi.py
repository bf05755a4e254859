"""What a kind of privileged information (PI) does, before any training: can a student that never sees it keep it?

The teacher is asked about the student's own rollouts with no PI, with the problem's own, and with those of other
problems. What it says under another problem's PI as under its own is a rule that all problems share, and can become the
student's; what it says under its own alone is this instance's, and a student that cannot see the PI is pulled to the
geometric mean of teachers that disagree (`consensus`). Where the PI can be worked out from the problem itself, a
student able to do so may learn more than the share that is kept says: no measure before training tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from protos.records import PAD_ID, Chat, GenerateItem, Int32, Privileged, PrivilegedIds, ScoreItem
from student_trainer.config import ConfigError
from student_trainer.privileged import privileged_of, refusals
from student_trainer.probes import consensus
from student_trainer.probes.answers import answer_row, percent, points, summary
from student_trainer.probes.closeness import Float64, decile_means, token_mean
from student_trainer.probes.collection import Collection, Question
from student_trainer.probes.draw import Bar, Line, Panel, png
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.paired import Paired
from student_trainer.probes.rollouts import Rollouts
from student_trainer.probes.run import Subjects
from student_trainer.run_folder import Row
from student_trainer.tasks import Problem
from student_trainer.teacher_identity import TeacherMismatch
from student_trainer.text import render_prompt

NO_EFFECT = 0.01
"""Nats a token that a PI must bring, in KL(told || untold): below it the teacher's distribution is a hundredth of a
coin toss from what it is without, and no gradient worth a run comes of it."""

SHARED, INSTANCE = 0.8, 0.2
"""Shares kept from which on a PI counts as a shared rule, and up to which as instance-specific. A rule in equal words
keeps exactly 1 and an answer that fits one problem 0 or less before it is cut off at 0, so that both ends are far away;
a fifth leaves room for wording that surrounds an answer, and for what a rule says differently of each problem."""

WIDEST_LIST = 64
"""Of each teacher's most likely ids where its vocabulary is too large to be asked for whole."""

MEASURES = ("information", "lost", "floor", "disagreement")


class PiProbe:
    """See `run.Probe`.

    Args:
        num_pis: M, how many PIs a problem's rollout is scored under: its own, and those of the M - 1 next problems.
    """

    name = "pi"

    def __init__(self, subjects: Subjects, num_pis: int) -> None:
        config = subjects.settings.config
        if config.privileged is None:
            raise ConfigError(
                "nothing is told to the teacher: set stage.privileged, as in stage.privileged.kind=answer"
            )
        if num_pis < 2 or num_pis > len(subjects.problems):
            raise ConfigError(
                f"--pis is {num_pis}; it must be from 2 to the number of problems, which is {len(subjects.problems)}"
            )
        if reasons := refusals(config.privileged, subjects.teacher.info):
            raise TeacherMismatch(f"teacher {subjects.teacher.url}: " + "; ".join(reasons))
        self._config = config.privileged
        self._student, self._teacher, self._task = subjects.student, subjects.teacher, subjects.task
        told = privileged_of(config.privileged)
        pis = [told(problem) for problem in subjects.problems]
        self._pis = {
            problem.id: [pis[(place + i) % len(pis)] for i in range(num_pis)]
            for place, problem in enumerate(subjects.problems)
        }
        self._rollouts = Rollouts(subjects)
        self._num_pis = num_pis
        self._vocab_size = subjects.teacher.info.tokenizer.vocab_size
        self._is_whole = self._vocab_size <= subjects.teacher.info.max_candidates
        info = subjects.teacher.info
        self._width = min(WIDEST_LIST, info.max_top_k, info.max_candidates // (num_pis + 1))

    @property
    def identity(self) -> Row:
        """See `run.Probe`."""
        return {"privileged": self._config.model_dump(mode="json"), "num_pis": self._num_pis}

    def collect(self, problems: Sequence[Problem], collection: Collection) -> None:
        """See `run.Probe`."""
        texts = self._rollouts.texts(problems, collection)
        most = self._rollouts.params.max_new_tokens
        for key, pis in (("untold", None), ("told", self._pis)):
            asked = [Question(f"{key}/{p.id}", (p, pis[p.id][0] if pis else None), most) for p in problems]
            collection.answers(asked, self._answer)
        asked = [Question(f"scores/{p.id}", (p, ids), self._num_scored(p, ids)) for p, ids in texts]
        collection.answers(asked, self._compare)

    def is_done(self, problem: Problem, rows: dict[str, Row]) -> bool:
        """See `run.Probe`."""
        return all(f"{key}/{problem.id}" in rows for key in ("untold", "told", "scores"))

    def result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> Row:
        """See `run.Probe`."""
        untold, told = ([rows[f"{key}/{p.id}"] for p in problems] for key in ("untold", "told"))
        values = {name: [np.asarray(rows[f"scores/{p.id}"][name], np.float64) for p in problems] for name in MEASURES}
        means = {
            name: {**token_mean(found).figures(), "by_decile": decile_means(found)} for name, found in values.items()
        }
        share = consensus.share_kept(
            *(float(sum(one.sum() for one in values[name])) for name in ("information", "lost"))
        )
        gain = Paired.of(*([row["is_right"] for row in found] for found in (untold, told)))
        result = {
            "num_pis": self._num_pis,
            "num_distinct_pis": len({_key(pi) for pis in self._pis.values() for pi in pis}),
            "is_whole_vocabulary": self._is_whole,
            "untold": summary(untold),
            "told": summary(told),
            "gain": gain.figures(),
            **means,
            "share_kept": share,
            "structure": structure(means["information"]["mean"], share),
        }
        return {**result, "verdict": verdict(result)}

    def tables(self, result: Row) -> Sequence[RenderableType]:
        """See `run.Probe`."""
        table = Table(title=f"Privileged information of the kind {self._config.kind}: {result['structure']}")
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("95 % interval", justify="right")
        for key in ("untold", "told"):
            low, high = result[key]["interval"]
            name = f"the teacher's accuracy, {key}"
            table.add_row(name, percent(result[key]["accuracy"]), f"{percent(low)} to {percent(high)}")
        low, high = result["gain"]["interval"]
        table.add_row("gain, points", points(result["gain"]["difference"]), f"{points(low)} to {points(high)}")
        for name, label in (
            ("information", "KL(told‖untold)"),
            ("lost", "KL(told‖geometric mean of the others)"),
            ("floor", f"floor -log Z of {result['num_pis']} teachers"),
            ("disagreement", "their disagreement (Jensen-Shannon)"),
        ):
            one = result[name]
            table.add_row(f"{label}, nats a token", f"{one['mean']:.4f}", f"{one['low']:.4f} to {one['high']:.4f}")
        table.add_row("share that can be kept", percent(result["share_kept"]), "")
        return [table]

    def plot(self, result: Row) -> bytes:
        """See `run.Probe`."""
        tenths = [tenth / 10 + 0.05 for tenth in range(10)]
        labels = {
            "information": "what the PI brings",
            "lost": "lost to the others' consensus",
            "floor": "floor -log Z",
            "disagreement": "disagreement",
        }
        lines = [Line(label, tenths, result[name]["by_decile"]) for name, label in labels.items()]
        bars = [Bar(key, result[key]["accuracy"], tuple(result[key]["interval"])) for key in ("untold", "told")]
        return png(
            [Panel("nats a token", lines, x_label="position in the rollout"), Panel("teacher's accuracy", bars=bars)]
        )

    def _answer(self, asked: Sequence[tuple[Problem, Privileged | None]]) -> list[Row]:
        """The teacher's greedy answers."""
        most = self._rollouts.params.max_new_tokens
        items = [
            GenerateItem(self._prompt(problem, pi), max_new_tokens=most, temperature=0.0, privileged=pi)
            for problem, pi in asked
        ]
        samples = [result.samples[0] for result in self._teacher.generate(items)]
        return [
            answer_row(
                self._task,
                self._student.tokenizer,
                problem,
                sample.token_ids,
                is_finished=sample.finish_reason == "stop",
            )
            for (problem, _), sample in zip(asked, samples, strict=True)
        ]

    def _num_scored(self, problem: Problem, ids: Int32) -> int:
        """Tokens that `_compare` has scored: under each PI and none, twice where it must ask which ids are likely."""
        num_distinct = len({_key(pi) for pi in self._pis[problem.id]})
        return (num_distinct + 1) * len(ids) * (1 if self._is_whole else 2)

    def _compare(self, texts: Sequence[tuple[Problem, Int32]]) -> list[Row]:
        rows: list[Row] = []
        for problem, ids in texts:
            pis = self._pis[problem.id]
            distinct: dict[object, Privileged | None] = {None: None} | {_key(pi): pi for pi in pis}
            logp_MTS = dict(zip(distinct, self._scored(problem, ids, list(distinct.values())), strict=True))
            free_TS, own_TS = logp_MTS[None], logp_MTS[_key(pis[0])]
            all_MTS = np.stack([logp_MTS[_key(pi)] for pi in pis])
            others_TS, _ = consensus.geometric_mean(all_MTS[1:])
            _, floor_T = consensus.geometric_mean(all_MTS)
            measured: dict[str, Float64] = {
                "information": consensus.kl(own_TS, free_TS),
                "lost": consensus.kl(own_TS, others_TS),
                "floor": floor_T,
                "disagreement": consensus.disagreement(all_MTS),
            }
            rows.append(
                {
                    "problem": problem.id,
                    NUM_TOKENS: self._num_scored(problem, ids),
                    **{name: values_T.tolist() for name, values_T in measured.items()},
                }
            )
        return rows

    def _scored(self, problem: Problem, ids: Int32, pis: Sequence[Privileged | None]) -> Float64:
        """log q of the same ids under each PI, [M, T, S], with all others as one more where S is not the vocabulary."""
        if self._is_whole:
            wanted_TS = np.arange(self._vocab_size, dtype=np.int32)[None]  # at every position
        else:
            firsts = self._teacher.score([self._item(problem, ids, pi, top_k=self._width) for pi in pis])
            wanted_TS = _union(np.concatenate([first.top_ids for first in firsts], -1))
        results = self._teacher.score([self._item(problem, ids, pi, wanted=wanted_TS) for pi in pis])
        logp_MTS = np.stack([result.candidate_logprobs for result in results]).astype(np.float64)
        logp_MTS = np.where(np.isnan(logp_MTS), -np.inf, logp_MTS)
        return logp_MTS if self._is_whole else consensus.with_tail(logp_MTS)

    def _item(
        self, problem: Problem, ids: Int32, pi: Privileged | None, *, top_k: int = 0, wanted: Int32 | None = None
    ) -> ScoreItem:
        return ScoreItem(
            self._prompt(problem, pi),
            ids,
            temperature=self._rollouts.params.temperature,
            top_k=top_k,
            candidate_ids=wanted,
            privileged=pi,
        )

    def _prompt(self, problem: Problem, pi: Privileged | None) -> Int32 | Chat:
        """Messages where something is to be told in them, and ids where not, which stock servers take."""
        if pi is None or isinstance(pi, PrivilegedIds):
            return render_prompt(self._student.tokenizer, problem.messages)
        return Chat(problem.messages)


def structure(information: float, share: float) -> str:
    """What kind of PI this is, by `NO_EFFECT`, `SHARED` and `INSTANCE`; `information` in nats a token."""
    if information < NO_EFFECT:
        return "no effect"
    if share >= SHARED:
        return "shared rule"
    return "instance-specific" if share <= INSTANCE else "mixed"


def verdict(result: Row) -> list[str]:
    """What to expect of on-policy self-distillation (OPSD) with this PI, in sentences."""
    gain, (low, high) = result["gain"], result["gain"]["interval"]
    share = percent(result["share_kept"])
    accuracies = [percent(result[key]["accuracy"]) for key in ("untold", "told")]
    first = (
        f"Told, the teacher goes from {accuracies[0]} to {accuracies[1]}: {points(gain['difference'])} points (95 % "
        f"interval {points(low)} to {points(high)}; McNemar's exact test p = {gain['p_value']:.2g})."
    )
    floor = f"the floor -log Z is {result['floor']['mean']:.4f} nats a token"
    second = {
        "no effect": f"No effect: the PI moves the teacher's predictions by {result['information']['mean']:.4f} nats a "
        "token on the student's rollouts. OPSD has nothing to learn from it.",
        "shared rule": f"Shared rule: {share} of what the PI brings holds under any problem's PI, and {floor}. "
        "Expect OPSD to take the behaviour into the weights.",
        "instance-specific": f"Instance-specific: {share} of what the PI brings holds under another problem's "
        f"PI, and {floor}. Expect OPSD to learn the marginal, PI-free policy and hedges with it, unless the PI can be "
        "worked out from the problem; use an external teacher or rewards instead.",
        "mixed": f"Mixed: {share} of what the PI brings holds under any problem's PI, and {floor}. Expect OPSD "
        "to keep that part, the form rather than the answers; measure on held-out problems.",
    }
    return [first, second[result["structure"]]]


def _key(pi: Privileged) -> object:
    """Equal for equal PIs."""
    return pi.ids.tobytes() if isinstance(pi, PrivilegedIds) else pi


def _union(ids_TN: Int32) -> Int32:
    """The distinct ids of each row, padded with PAD_ID, int32 [T, S]."""
    rows = [np.unique(row[row != PAD_ID]) for row in ids_TN]
    union_TS = np.full((len(rows), max(map(len, rows))), PAD_ID, np.int32)
    for row, ids in zip(union_TS, rows, strict=True):
        row[: len(ids)] = ids
    return union_TS
