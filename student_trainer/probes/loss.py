"""Where a loss pulls on real rollouts, against the full-vocabulary gradient that it stands for, before any step.

The loss that the config has chosen comes first; the other truncated losses, over the same ids, cost no more answers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table

from protos.records import PAD_ID, Chat, Int32, ScoreItem, ScoreResult, crc32_of
from student_trainer import losses
from student_trainer.config import ConfigError, LossConfig, OpdStage, OpsdStage
from student_trainer.config.loss import FULL_VOCABULARY, SAMPLED
from student_trainer.privileged import privileged_of, refusals
from student_trainer.probes.collection import Collection, Question
from student_trainer.probes.draw import Bar, Panel, png
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.gradients import GradientSums, compare, reference_config, total
from student_trainer.probes.rollouts import Rollouts
from student_trainer.probes.run import Subjects
from student_trainer.rollout.base import Rollout
from student_trainer.run_folder import Row
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import collate_scored
from student_trainer.tasks import Problem
from student_trainer.teacher_identity import TeacherMismatch
from student_trainer.text import render_prompt

TRUNCATED = (
    "stop_gradient_reverse_kl",
    "tail_reverse_kl",
    "renormalised_reverse_kl",
    "biased_reverse_kl",
    "tail_forward_kl",
    "renormalised_forward_kl",
)

WINDOW = 64
"""Tokens of a rollout that are looked at, in one piece at a random place: of a vocabulary of 151,936 they are 39 MB of
logits, and many short pieces tell more of a loss than few whole rollouts."""


class LossProbe:
    """See `run.Probe`."""

    name = "loss"

    def __init__(self, subjects: Subjects) -> None:
        config, settings = subjects.settings.config, subjects.settings
        if not isinstance(config.stage, OpdStage | OpsdStage):
            raise ConfigError(f"stage {config.stage.kind} has no distillation loss: set stage.kind to opd or opsd")
        self._student, self._teacher = subjects.student, subjects.teacher
        self._loss = config.stage.loss
        self._vocab_size = subjects.student.fingerprint.vocab_size
        if subjects.student.max_top_k < self._vocab_size:
            raise ConfigError(
                f"the student at {settings.options.student_url} gives {subjects.student.max_top_k} of its "
                f"{self._vocab_size} log-probs, and a gradient needs them all: give its path as --student"
            )
        info = subjects.teacher.info
        self._width = min(self._vocab_size, info.max_top_k, info.max_candidates)
        needed = 1 if self._loss.kind in SAMPLED else min(self._loss.top_k, self._vocab_size)
        if self._width < needed:
            raise ConfigError(f"loss.top_k is {self._loss.top_k}, and {subjects.teacher.url} gives {self._width}")
        if self._loss.kind in FULL_VOCABULARY and not self._is_exact:
            raise ConfigError(
                f"loss kind {self._loss.kind} needs the teacher's {self._vocab_size} log-probs a token, and "
                f"{subjects.teacher.url} gives {self._width}: choose a truncated loss"
            )
        if self._is_exact and info.tokenizer.vocab_size != self._vocab_size:
            raise ConfigError(
                f"a gradient over whole vocabularies: the student's output has {self._vocab_size} rows, that of "
                f"{subjects.teacher.url} has {info.tokenizer.vocab_size}"
            )
        self._privileged = config.privileged
        if self._privileged and (reasons := refusals(self._privileged, info)):
            raise TeacherMismatch(f"teacher {subjects.teacher.url}: " + "; ".join(reasons))
        self._told = privileged_of(self._privileged) if self._privileged else None
        self._rollouts = Rollouts(subjects)
        self._temperature, self._seed = config.rollout.temperature, config.seed
        self._pairs = {kind: self._pair(kind) for kind in dict.fromkeys((self._loss.kind, *TRUNCATED))}

    @property
    def identity(self) -> Row:
        """See `run.Probe`."""
        told = self._privileged.model_dump(mode="json") if self._privileged else None
        return {"loss": self._loss.model_dump(mode="json"), "width": self._width, "privileged": told}

    def collect(self, problems: Sequence[Problem], collection: Collection) -> None:
        """See `run.Probe`."""
        texts = self._rollouts.texts(problems, collection)
        asked = [Question(f"gradients/{p.id}", (p, ids), self._num_scored(ids)) for p, ids in texts]
        collection.answers(asked, self._compare)

    def is_done(self, problem: Problem, rows: dict[str, Row]) -> bool:
        """See `run.Probe`."""
        return f"gradients/{problem.id}" in rows

    def result(self, problems: Sequence[Problem], rows: dict[str, Row]) -> Row:
        """See `run.Probe`."""
        found = {
            kind: total([rows[f"gradients/{problem.id}"]["losses"][kind] for problem in problems]).figures()
            for kind in self._pairs
        }
        result = {
            "chosen": self._loss.kind,
            "support": self._loss.support,
            "top_k": min(self._loss.top_k, self._vocab_size),
            "vocab_size": self._vocab_size,
            "is_exact": self._is_exact,
            "reference_width": self._width,
            "losses": found,
        }
        return {**result, "verdict": verdict(result)}

    def tables(self, result: Row) -> Sequence[RenderableType]:
        """See `run.Probe`."""
        ids = f"{result['support']} top {result['top_k']} of {result['vocab_size']}"
        table = Table(title=f"Gradients over the {ids}, against the whole vocabulary's")
        table.add_column("loss")
        for name in ("cosine", "norm ratio", "bias ratio", "P", "Q", "P - Q", "leaks"):
            table.add_column(name, justify="right")
        for kind, one in result["losses"].items():
            table.add_row(
                f"[bold]{kind}[/] (chosen)" if kind == result["chosen"] else kind,
                f"{one['cosine']:.4f}",
                f"{one['relative_norm']:.3f}",
                f"{one['bias_ratio']:.4f}",
                f"{one['student_mass']:.4f}",
                f"{one['teacher_mass']:.4f}",
                f"{one['mass_gap']:+.4f}",
                "[red]yes[/]" if one["leaks"] else "no",
            )
        return [table]

    def plot(self, result: Row) -> bytes:
        """See `run.Probe`."""
        return png(
            [
                Panel(label, bars=[Bar(kind, one[name]) for kind, one in result["losses"].items()])
                for name, label in (("cosine", "cosine to the full gradient"), ("bias_ratio", "bias ratio"))
            ]
        )

    @property
    def _is_exact(self) -> bool:
        return self._width >= self._vocab_size

    def _pair(self, kind: str) -> tuple[Objective, Objective]:
        """A loss over the chosen ids, and what it stands for."""
        chosen = self._loss.model_dump() if kind == self._loss.kind else {"kind": kind}
        config = LossConfig.model_validate({**chosen, "support": self._loss.support, "top_k": self._loss.top_k})
        reference = reference_config(config, self._width, self._vocab_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a loss is biased is what the result says
            return self._objective(config), self._objective(reference)

    def _objective(self, config: LossConfig) -> Objective:
        eos_token_ids = self._student.fingerprint.eos_token_ids
        return Objective(config, self._vocab_size, self._temperature, eos_token_ids=eos_token_ids)

    def _num_scored(self, ids: Int32) -> int:
        """Tokens scored for a rollout, at most: the piece by the student, all before its end by the teacher."""
        return min(WINDOW, len(ids)) + len(ids)

    def _compare(self, texts: Sequence[tuple[Problem, Int32]]) -> list[Row]:
        starts = [self._start(ids) for _, ids in texts]
        places = list(zip(texts, starts, strict=True))
        own = self._student.score([self._own_item(problem, ids, start) for (problem, ids), start in places])
        asked = [
            self._teacher_item(problem, ids[: start + WINDOW], start, mine)
            for ((problem, ids), start), mine in zip(places, own, strict=True)
        ]
        rows: list[Row] = []
        answered = zip(places, asked, own, self._teacher.score(asked), strict=True)
        for ((problem, _), start), item, mine, theirs in answered:
            sums = self._sums(problem, item, start, mine, theirs)
            found = {kind: asdict(one) for kind, one in sums.items()}
            rows.append({"problem": problem.id, NUM_TOKENS: self._num_scored(item.completion_ids), "losses": found})
        return rows

    def _start(self, ids: Int32) -> int:
        """Where the piece of a rollout that is looked at begins."""
        last = max(0, len(ids) - WINDOW)
        return int(np.random.default_rng([self._seed, crc32_of(ids)]).integers(last + 1))

    def _own_item(self, problem: Problem, ids: Int32, start: int) -> ScoreItem:
        """The piece for the student, the tokens before it joined to the prompt, with the whole vocabulary."""
        prompt = np.concatenate([render_prompt(self._student.tokenizer, problem.messages), ids[:start]])
        piece = ids[start : start + WINDOW]
        return ScoreItem(prompt, piece, temperature=self._temperature, top_k=self._vocab_size)

    def _teacher_item(self, problem: Problem, ids: Int32, start: int, own: ScoreResult) -> ScoreItem:
        """The rollout up to the end of the piece for the teacher, with what it is told, at the student's ids."""
        wanted = np.full((len(ids), self._width), PAD_ID, np.int32)
        wanted[start:] = own.top_ids[:, : self._width]
        return ScoreItem(
            Chat(problem.messages) if self._told else render_prompt(self._student.tokenizer, problem.messages),
            ids,
            temperature=self._temperature,
            top_k=self._width,
            candidate_ids=wanted,
            privileged=self._told(problem) if self._told else None,
        )

    def _sums(
        self, problem: Problem, item: ScoreItem, start: int, own: ScoreResult, teacher: ScoreResult
    ) -> dict[str, GradientSums]:
        piece = replace(
            teacher,
            sampled_logprobs=teacher.sampled_logprobs[start:],
            top_ids=teacher.top_ids[start:],
            top_logprobs=teacher.top_logprobs[start:],
            candidate_logprobs=teacher.candidate_logprobs[start:],
        )
        prompt, ids = render_prompt(self._student.tokenizer, problem.messages), item.completion_ids[start:]
        top_ids = own.top_ids[:, : self._width]
        rollout = Rollout(problem, prompt, ids, own.sampled_logprobs, top_ids, is_finished=True, text="")
        batch = collate_scored([rollout], [piece])
        all_ids, all_logp = (torch.from_numpy(np.array(a))[None] for a in (own.top_ids, own.top_logprobs))
        logits_BTV = losses.full_vocabulary(all_ids, all_logp, batch.mask_BT) * self._temperature
        return {kind: compare(*pair, logits_BTV, batch) for kind, pair in self._pairs.items()}


def verdict(result: Row) -> list[str]:
    """What to expect of the chosen loss, in sentences."""
    kind = result["chosen"]
    one = result["losses"][kind]
    full = (
        "the full-vocabulary gradient"
        if result["is_exact"]
        else (f"the gradient over the widest lists there are ({result['reference_width']} ids and the rest as one)")
    )
    sentences = [f"{kind}: cosine {one['cosine']:.4f} to {full}, {one['relative_norm']:.2f} times as long."]
    if kind in SAMPLED:
        sentences.append(
            "A sampled token's gradient is one draw: its cosine says how noisy one is; the mean over draws is exact."
        )
    if one["leaks"]:
        goal, eos = one["teacher_mass"] / math.e, one["eos_probability"]
        cosine = result["losses"]["stop_gradient_reverse_kl"]["cosine"]
        sentences.append(
            "WARNING, this loss leaks: where the teacher is the student it still has a gradient, the +1 that a "
            f"truncated sum does not cancel; now it is {one['bias_ratio']:.1%} of the teacher's pull. It drives the "
            f"student's mass on the support from P = {one['student_mass']:.4f} to Q / e = {goal:.4f}, and with EOS in "
            f"the support (mean probability {eos:.4f}) completions grow by up to e. The nearer P is to 1, the later "
            f"it shows. Take stop_gradient_reverse_kl: cosine {cosine:.4f}, no leak."
        )
    else:
        sentences.append("No leak: where the teacher is the student, its gradient is 0.")
    if kind.startswith("renormalised"):
        sentences.append("Its mass P on the support is free: watch support_gap.")
    return sentences
