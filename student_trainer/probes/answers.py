"""Whole answers to problems: judged, counted and worded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from protos.records import Int32
from student_trainer.evaluate import wilson_interval
from student_trainer.probes.folder import NUM_TOKENS
from student_trainer.probes.students import text_of
from student_trainer.run_folder import Row
from student_trainer.tasks import Problem, Task

RIGHT = 1.0
"""The reward of a right answer; one that is partly right is wrong here."""

NOTHING = np.empty(0, np.int32)
"""The prefix of an answer that is written from its start."""


def answer_row(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    ids: Int32,
    *,
    is_finished: bool,
    prefix_ids: Int32 = NOTHING,
) -> Row:
    """The raw row of an answer, of which `ids` were written and `prefix_ids` were given."""
    text = text_of(tokenizer, np.concatenate([prefix_ids, ids]))
    return {
        "problem": problem.id,
        "prefix_ids": prefix_ids.tolist(),
        "token_ids": ids.tolist(),
        NUM_TOKENS: len(ids),
        "text": text,
        "is_finished": is_finished,
        "is_right": task.reward(problem, text) >= RIGHT,
        "is_well_formed": task.is_well_formed(problem, text),
    }


def summary(rows: Sequence[Row]) -> Row:
    """Accuracy with Wilson's 95 % interval, format rate, and accuracy among the well-formed; NaN of no answers."""
    num, num_right = len(rows), sum(row["is_right"] for row in rows)
    num_formed = sum(row["is_well_formed"] for row in rows)
    num_right_formed = sum(row["is_right"] and row["is_well_formed"] for row in rows)
    return {
        "num_answers": num,
        "accuracy": num_right / num if num else math.nan,
        "interval": list(wilson_interval(num_right / num, num)) if num else [math.nan, math.nan],
        "well_formed": num_formed / num if num else math.nan,
        "accuracy_well_formed": num_right_formed / num_formed if num_formed else math.nan,
        "truncation_rate": sum(not row["is_finished"] for row in rows) / num if num else math.nan,
    }


def percent(share: float) -> str:
    """62.1 %; a dash for what does not exist."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in points, with its sign; a dash for what does not exist."""
    return "-" if math.isnan(difference) else f"{100 * difference:+.1f}"
