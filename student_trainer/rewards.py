"""Whether a text holds the right answer: functions of (answer, text), chosen by name.

A model's text never raises here, whatever it holds. An `answer` that no text could match is found when a task is
loaded, by `check_answer`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from student_trainer.math_judge import judge
from student_trainer.tasks.config import RewardName

MAX_NUMBER_CHARS = 400
"""Of a number compared exactly: no float64 is longer, and Python refuses integers of over 4,300 digits."""

MAX_EXPONENT_DIGITS = 3
"""1e999 is compared exactly; 1e999999999 would take a gigabyte."""

_THOUGHT = ("<think>", "</think>")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_BOX = "\\boxed{"

_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−]\$?)?"  # a minus right after a digit, a letter or a bracket subtracts
    r"(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][+-]?\d+)?(?:\s?/\s?\d+)?"
)

_LONE_LETTER = re.compile(r"\W*(?:text\W*)?([A-Za-z])\W*")
_STATED_LETTER = re.compile(r"(?i:\banswer(?:\s+is)?)[\s:*($]*([A-Z])\b")
_LEADING_LETTER = re.compile(r"\W*([A-Z])[).:]")


@dataclass(frozen=True)
class Reward:
    """One rule.

    Attributes:
        score: (answer, text) -> 1.0 when the text's answer is `answer`, else 0.0.
        is_well_formed: text -> whether an answer can be read from it.
        accepts: answer -> whether any text could be right.
        expects: what `accepts` asks for, in words.
    """

    score: Callable[[str, str], float]
    is_well_formed: Callable[[str], bool]
    accepts: Callable[[str], bool]
    expects: str


def final_answer(text: str) -> str | None:
    """The part of `text` that answers.

    After the thought, when there is one: the last <answer>...</answer> or else everything; in that, the last
    \\boxed{...} or else everything. None when the thought never ends or nothing is left.
    """
    part = tagged_answer(text) or _after_thought(text)
    if part is None:
        return None
    return (_unboxed(part) or part).strip() or None


def tagged_answer(text: str) -> str | None:
    """What the last <answer>...</answer> after the thought holds, or None when there is none or it is empty."""
    tagged = _TAGGED.findall(_after_thought(text) or "")
    return tagged[-1].strip() or None if tagged else None


def exact_match(answer: str, text: str) -> float:
    """1.0 when the final answer is `answer`, up to case, white space, Unicode compatibility forms and a full stop."""
    found = final_answer(text)
    return float(found is not None and _normalised(found) == _normalised(answer))


def multiple_choice(answer: str, text: str) -> float:
    """1.0 when the letter chosen is `answer`.

    The letter stands alone, or after "answer (is)", the last time when there are several, or opens the text as "C)".
    """
    return float(choice_in(text) == answer.strip().upper())


def number(answer: str, text: str) -> float:
    """1.0 when the last number of the final answer equals `answer` exactly, as fractions: 1,000.50 = 2001/2."""
    found = number_in(text)
    return float(found is not None and found == number_in(answer))


def math(answer: str, text: str) -> float:
    """1.0 when math-verify finds the final expression equal to `answer`; what it cannot decide in time is 0.0."""
    found = _expression(text)
    return float(found is not None and judge(_as_latex(answer), found).is_right)


def choice_in(text: str) -> str | None:
    """The capital letter that `text` chooses, or None."""
    found = final_answer(text)
    if found is None:
        return None
    if lone := _LONE_LETTER.fullmatch(found):
        return lone[1].upper()
    if stated := _STATED_LETTER.findall(found):
        return stated[-1]
    leading = _LEADING_LETTER.match(found)
    return leading[1] if leading else None


def number_in(text: str) -> Fraction | None:
    """The last number in the final answer of `text`, exactly, or None when there is none of a sane size."""
    found = _NUMBER.findall(final_answer(text) or "")
    return _as_fraction(found[-1]) if found else None


REWARDS: dict[RewardName, Reward] = {
    "exact": Reward(
        score=exact_match,
        is_well_formed=lambda text: final_answer(text) is not None,
        accepts=lambda answer: bool(_normalised(answer)),
        expects="a text",
    ),
    "multiple_choice": Reward(
        score=multiple_choice,
        is_well_formed=lambda text: choice_in(text) is not None,
        accepts=lambda answer: re.fullmatch("[A-Za-z]", answer.strip()) is not None,
        expects="one letter",
    ),
    "number": Reward(
        score=number,
        is_well_formed=lambda text: number_in(text) is not None,
        accepts=lambda answer: _NUMBER.fullmatch(answer.strip()) is not None and number_in(answer) is not None,
        expects="one number",
    ),
    "math": Reward(
        score=math,
        is_well_formed=lambda text: (found := _expression(text)) is not None and judge(None, found).is_readable,
        accepts=lambda answer: judge(None, _as_latex(answer)).is_readable,
        expects="an expression that math-verify can read",
    ),
}
"""The rules, by the name a configuration gives."""


def check_answer(name: RewardName, answer: str) -> None:
    """Raises ValueError when no text could be right under the rule `name`."""
    rule = REWARDS[name]
    if not rule.accepts(answer):
        raise ValueError(f"{answer!r} is not {rule.expects}, which the reward {name!r} needs")


def _after_thought(text: str) -> str | None:
    opening, closing = _THOUGHT
    _, _, after = text.rpartition(closing)
    return None if opening in after else after


def _unboxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, or None when there is none or its braces do not match."""
    _, found, rest = text.rpartition(_BOX)
    depth = 1
    for end, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[:end] if found else None
    return None


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".")


def _as_fraction(literal: str) -> Fraction | None:
    plain = re.sub(r"[,$\s]", "", literal).replace("−", "-")
    decimal, _, denominator = plain.partition("/")
    _, _, exponent = decimal.lower().partition("e")
    if len(plain) > MAX_NUMBER_CHARS or len(exponent.lstrip("+-")) > MAX_EXPONENT_DIGITS:
        return None
    if denominator and int(denominator) == 0:
        return None
    return Fraction(decimal) / int(denominator or 1)


def _expression(text: str) -> str | None:
    """What math-verify reads: it knows \\boxed{} and prose itself, but not answer tags."""
    tagged = tagged_answer(text)
    return _as_latex(tagged) if tagged else _after_thought(text)


def _as_latex(expression: str) -> str:
    return expression if "$" in expression or _BOX in expression else f"${expression}$"
