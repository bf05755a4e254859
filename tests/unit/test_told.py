"""What a teacher is told of a problem: from the config's table to the contract's record."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest

from protos.records import Chat, Message, PrivilegedIds, Reference, SystemText, UserPrefix, UserSuffix
from student_trainer.config import ConfigError, TrainConfig, parse_config
from student_trainer.privileged import num_context_tokens, privileged_of, refusals
from student_trainer.study.toy import toy_tokenizer
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt
from student_trainer.wording import check_wording, fill
from teacher_server.privileged import compose
from tests import records

PROBLEM = Problem("p7", (Message("user", "3+5"),), answer="8", reference="3+5={answer};")
INFO = replace(records.INFO, reference_templates=("answer", "solution"))


def config(privileged: dict, **task) -> TrainConfig:
    return parse_config(
        {
            "run": "r",
            "steps": 1,
            "model": {"path": "m"},
            "task": {"kind": "toy"} | task,
            "teacher": {"url": "grpc://h:1"},
            "stage": {"kind": "opsd", "privileged": privileged},
        }
    )


def told(privileged: dict, **task):
    resolved = config(privileged, **task).privileged
    assert resolved is not None
    return privileged_of(resolved)(PROBLEM)


@pytest.mark.parametrize(
    ("privileged", "expected"),
    [
        ({"kind": "system", "text": "R"}, SystemText("R")),
        ({"kind": "user_prefix", "text": "It is {answer}."}, UserPrefix("It is 8.")),
        # What is filled in holds a placeholder of its own, which stays as it is.
        ({"kind": "user_suffix", "text": "{reference} so {answer}"}, UserSuffix("3+5={answer}; so 8")),
        ({"kind": "answer"}, Reference("8", "answer")),
        ({"kind": "answer", "template": "plain"}, Reference("8", "plain")),
        ({"kind": "reference"}, Reference("3+5={answer};", "solution")),
    ],
)
def test_every_kind_of_the_contract_is_reached(privileged, expected):
    assert told(privileged) == expected


def test_ids_are_reached_too():
    ids = told({"kind": "ids", "ids": [4, 2]})
    assert isinstance(ids, PrivilegedIds)
    assert (ids.ids.tolist(), ids.ids.dtype) == ([4, 2], np.int32)


def test_a_task_has_words_of_its_own_and_the_stage_s_come_first():
    assert told({"kind": "user_suffix"}, privileged_text="m{answer}") == UserSuffix("m8")
    assert told({"kind": "user_suffix", "text": "{answer}"}, privileged_text="m{answer}") == UserSuffix("8")
    with pytest.raises(ConfigError, match=r"without a text: set the text of its table, or task\.privileged_text"):
        config({"kind": "user_suffix"})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("{answers}", "{answer}"),
        ("{ answer }", "{answer}"),
        ("{Reference}", "{reference}"),
        ("{solution}", "{reference}"),
    ],
)
def test_what_is_nearly_a_placeholder_is_refused_with_the_one_that_was_meant(text, meant):
    with pytest.raises(ConfigError) as caught:
        config({"kind": "system", "text": f"Say {text}."})
    assert f"text: {text} is no placeholder; did you mean {meant}?" in str(caught.value)


@pytest.mark.parametrize(
    "text", [r"\boxed{{answer}}", r"\frac{a}{b}", r"\text{solution}", '{"json": 1}', "%s {0} {{x}}"]
)
def test_other_braces_are_text(text):
    assert fill(check_wording(text), {"answer": "8", "reference": None}) == text.replace("{answer}", "8")


def test_a_blank_text_is_refused():
    with pytest.raises(ConfigError, match="tells a teacher nothing"):
        config({"kind": "system", "text": " \n"})


def test_a_problem_without_what_is_to_be_told_is_named():
    bare = dataclasses.replace(PROBLEM, reference=None)
    for table in ({"kind": "reference"}, {"kind": "user_suffix", "text": "{reference}"}):
        privileged = config(table).privileged
        assert privileged is not None
        with pytest.raises(ValueError, match="problem p7, of which the teacher is to be told more, has no reference"):
            privileged_of(privileged)(bare)


@pytest.mark.parametrize(
    ("privileged", "info", "sentence"),
    [
        ({"kind": "answer"}, INFO, None),
        (
            {"kind": "answer", "template": "kind"},
            INFO,
            "template 'kind' was asked for; the teacher has answer, solution",
        ),
        ({"kind": "user_prefix", "text": "x"}, INFO, None),
        (
            {"kind": "system", "text": "x"},
            dataclasses.replace(INFO, privileged_kinds=("ids",)),
            "of the kind system was asked for; the teacher takes ids",
        ),
    ],
)
def test_a_teacher_that_cannot_be_told_is_refused_before_the_first_step(privileged, info, sentence):
    resolved = config(privileged).privileged
    assert resolved is not None
    reasons = refusals(resolved, info)
    assert (not reasons) if sentence is None else (len(reasons) == 1 and sentence in reasons[0])


TOLD = (Message("user", "1"), Message("assistant", "2"), Message("user", "3+5"))
RULED = (Message("system", "T"), *TOLD)


@pytest.mark.parametrize("messages", [TOLD[:1], TOLD, RULED])
@pytest.mark.parametrize(
    "privileged",
    [
        None,
        SystemText("R"),
        UserPrefix("1+1"),
        UserSuffix("22"),
        Reference("m8", "plain"),
        PrivilegedIds(np.array([4, 2])),
    ],
)
def test_the_trainer_counts_the_context_that_a_server_composes(messages, privileged):
    tokenizer = toy_tokenizer()

    def render(turns):
        return render_prompt(tokenizer, turns)

    composed = compose(Chat(messages), privileged, render)
    problem = dataclasses.replace(PROBLEM, messages=messages)
    assert num_context_tokens(tokenizer, problem, privileged) == len(composed.ids)


def test_a_chat_template_that_takes_no_system_message_is_named_with_the_problem():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}:"
    )
    with pytest.raises(ValueError, match=r"problem p7: the model's chat template does not take .*: no system here"):
        num_context_tokens(tokenizer, PROBLEM, SystemText("R"))
