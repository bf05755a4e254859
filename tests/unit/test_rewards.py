"""Rewards: what counts as the answer, and that nothing a model writes stops a run."""

from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from student_trainer.math_judge import UNDECIDED, MathJudge, Verdict
from student_trainer.rewards import (
    REWARDS,
    check_answer,
    choice_in,
    exact_match,
    final_answer,
    math,
    multiple_choice,
    number,
    number_in,
    tagged_answer,
)

ENDLESS = "$99999999999!$"
"""A factorial that sympy would compute for days."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Paris ", "Paris"),
        ("<think>Rome?</think>Paris", "Paris"),
        ("Rome?</think>Paris", "Paris"),  # the prompt opened the thought
        ("<think>Rome? Paris", None),
        ("<think>a</think>b<think>c", None),
        ("<answer>Rome</answer> no: <answer> Paris </answer> I am sure", "Paris"),
        ("<think><answer>Rome</answer></think>Paris", "Paris"),
        (r"first \boxed{Rome} then \boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"<answer>\boxed{C}</answer>", "C"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("a } b", "a } b"),
        ("", None),
        ("<think>Rome</think>  ", None),
    ],
)
def test_final_answer(text: str, expected: str | None) -> None:
    assert final_answer(text) == expected


def test_tagged_answer_needs_tags() -> None:
    assert tagged_answer("it is 5") is None
    assert tagged_answer("<answer> </answer>") is None
    assert tagged_answer("<answer>4</answer> <ANSWER>5</ANSWER>") == "5"


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        ("New York", "new\n york.", 1.0),
        ("ﬁve", "FIVE", 1.0),  # a ligature
        ("New York", "York", 0.0),
        ("5", "15", 0.0),
    ],
)
def test_exact_match(answer: str, text: str, expected: float) -> None:
    assert exact_match(answer, text) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("C", "C"),
        ("(c).", "C"),
        (r"so \boxed{\text{C}} holds", "C"),
        ("The answer is (C), not B.", "C"),
        ("The answer is B? No: the answer is **C**", "C"),
        ("Answer: C", "C"),
        ("C) because it rains", "C"),
        ("A cat sat there", None),
        ("The answer: Therefore", None),
        ("none of them", None),
        ("<think>The answer is C", None),
    ],
)
def test_choice(text: str, letter: str | None) -> None:
    assert choice_in(text) == letter
    assert multiple_choice("C", text) == float(letter == "C")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3 + 4 = 7.", Fraction(7)),
        ("1,234.50 dollars", Fraction(2469, 2)),
        ("it costs $1,000,000", Fraction(1_000_000)),
        ("-$5", Fraction(-5)),
        ("x=−5", Fraction(-5)),
        ("8-5", Fraction(5)),  # a difference, not minus five
        ("(8)-5", Fraction(5)),
        ("3/4", Fraction(3, 4)),
        ("0.75", Fraction(3, 4)),
        (".5", Fraction(1, 2)),
        ("1.5e3", Fraction(1500)),
        ("5km", Fraction(5)),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 5000, None),
        ("no digits", None),
        ("x2", None),
    ],
)
def test_number_is_exact(text: str, value: Fraction | None) -> None:
    assert number_in(text) == value


def test_number_compares_values_not_spellings() -> None:
    assert number("0.1", "1/10") == 1.0
    assert number("0.3", "0.30000000000000001") == 0.0
    assert number("72", "72 apples and 3 pears") == 0.0


@pytest.mark.parametrize(
    ("answer", "text", "expected"),
    [
        (r"\frac{1}{2}", r"thus \boxed{0.5}", 1.0),
        ("1/2", r"<answer>\frac{2}{4}</answer>", 1.0),
        ("x+1", "$1+x$", 1.0),
        ("(1,2)", "it is $(1,2)$", 1.0),
        ("(1,2)", "it is $(2,1)$", 0.0),
        ("3", "it is $4$", 0.0),
        ("3", "<think>it is 3", 0.0),
        ("3", "", 0.0),
    ],
)
def test_math(answer: str, text: str, expected: float) -> None:
    assert math(answer, text) == expected


def test_math_works_outside_the_main_thread() -> None:
    texts = ["$2$", "$3$", "$2.0$", "no answer"]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda text: math("2", text), texts)) == [1.0, 0.0, 1.0, 0.0]


def test_a_judge_that_hangs_is_replaced() -> None:
    judge = MathJudge(timeout_s=3.0)
    try:
        assert judge.judge("$3$", "$3$") == Verdict(is_readable=True, is_right=True)
        assert judge.judge("$3$", ENDLESS) == UNDECIDED
        assert judge.judge(None, "$3$") == Verdict(is_readable=True, is_right=False)
    finally:
        judge.close()


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [("exact", "Paris", " "), ("multiple_choice", " b", "AB"), ("number", "1,000", "5 km"), ("math", "x^2", "")],
)
def test_check_answer(name: str, good: str, bad: str) -> None:
    check_answer(name, good)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"which the reward '{name}' needs"):
        check_answer(name, bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["exact", "multiple_choice", "number"])
@settings(deadline=None)
@given(text=st.text() | st.text(alphabet="0123456789.,-−/eE+$ \\boxed{}<>answer"))
def test_any_text_gets_a_reward(name: str, text: str) -> None:
    rule = REWARDS[name]  # pyright: ignore[reportArgumentType]
    reward = rule.score("3", text)
    assert reward in (0.0, 1.0)
    assert reward == 0.0 or rule.is_well_formed(text)


@settings(deadline=None)
@given(value=st.fractions(max_denominator=10_000).filter(lambda value: abs(value) < 10**30))
def test_every_fraction_is_read_back(value: Fraction) -> None:
    assert number_in(f"so we get {value}") == value
