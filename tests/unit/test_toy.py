"""The toy world: its prompts, traces, rules and models are what its documentation shows."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.records import Chat, Int32, Message, SystemText, UserSuffix
from student_trainer.study.toy import VOCABULARY, Sum, answer_of, build_toy_model, told, toy_task, toy_tokenizer, trace
from student_trainer.tasks import ToyTask, build_task
from teacher_server.privileged import compose


def render(*messages: Message) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = toy_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def sums(problems: object) -> set[str]:
    return {one.messages[-1].content.partition("\n")[0] for one in problems}  # pyright: ignore


def test_prompts_are_rendered_as_documented() -> None:
    assert render(Message("user", "3+5+7")) == "<bos>3+5+7:"
    assert render(Message("system", "R"), Message("user", "3+5+7")) == "<bos>R\n3+5+7:"
    assert render(Message("user", told("3+5+7", "15"))) == "<bos>3+5+7\n\n15:"


@pytest.mark.parametrize(
    ("privileged", "expected"),
    [
        (SystemText("R"), render(Message("system", "R"), Message("user", "3+5+7"))),
        (UserSuffix("15"), render(Message("user", told("3+5+7", "15")))),
    ],
)
def test_a_teacher_server_composes_the_prompts_that_the_toy_teacher_was_trained_on(
    privileged: SystemText | UserSuffix, expected: str
) -> None:
    tokenizer = toy_tokenizer()

    def ids(messages: tuple[Message, ...]) -> Int32:
        return np.array(tokenizer(render(*messages))["input_ids"], np.int32)

    context = compose(Chat((Message("user", "3+5+7"),)), privileged, ids)
    assert tokenizer.decode(context.ids.tolist()) == expected


def test_traces_are_written_as_documented() -> None:
    rng = random.Random(0)
    assert trace(Sum((3, 5, 7)), rng) == "3+5=8;8+7=15;m15"
    assert trace(Sum((3, 5, 7), "reversed"), rng) == "3+5=8;8+7=15;m51"
    assert trace(Sum((3, 5, 7), "terse"), rng) == "m15"
    assert trace(Sum((3, 7), "reversed"), rng) == "3+7=10;m01"


def test_an_error_is_taken_back_at_once() -> None:
    # At rate 1 both steps start with a sum that is one off.
    assert {trace(Sum((3, 5, 7)), random.Random(seed), error_rate=1.0) for seed in range(40)} == {
        f"3+5={first}w8;8+7={second}w15;m15" for first in (7, 9) for second in (14, 16)
    }


def test_errors_come_at_the_rate_asked_for() -> None:
    task = toy_task(ToyTask(train_size=2000, held_out_size=10, error_rate=0.25))
    steps = [step for one in task.train for step in (one.reference or "").split(";")[:-1]]
    share = sum("w" in step for step in steps) / len(steps)
    # About 6000 steps: four standard deviations are 4 * sqrt(.25 * .75 / 6000) = .022.
    assert share == pytest.approx(0.25, abs=0.022)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3+5=8;8+7=15;m15", "15"),
        ("3+5=9w8;8+7=15;m15", "15"),
        ("m15", "15"),
        ("3+5=8;8+7=15;", None),
        ("3+5=8;8+7=15;m", None),
        ("3+5=8;8+7=15;m15m15", None),
        ("3+5=8;8+7=15;m15;", None),
        ("3+5=;m15", None),
        ("15", None),
        ("m15\n", None),
        ("", None),
    ],
)
def test_well_formed_texts(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


def test_the_reward_is_for_the_answer_alone() -> None:
    task = build_task(ToyTask(train_size=5, held_out_size=5))
    one = task.train[0]
    assert task.reward(one, f"m{one.answer}") == 1.0
    assert task.reward(one, f"m{one.answer}0") == 0.0
    assert task.reward(one, one.answer) == 0.0
    assert task.is_well_formed(one, f"m{one.answer}0")
    assert not task.is_well_formed(one, one.answer)


@settings(max_examples=15, deadline=None)
@given(
    config=st.builds(
        ToyTask,
        min_terms=st.just(3),
        max_terms=st.integers(3, 6),
        train_size=st.integers(1, 80),
        held_out_size=st.integers(1, 40),
        rules=st.sampled_from([("reversed",), ("terse",), ("reversed", "terse")]),
        rule_rate=st.floats(0, 1),
        show_rule=st.booleans(),
        hint_rate=st.floats(0, 1),
        error_rate=st.floats(0, 0.9),
        seed=st.integers(0, 9),
    )
)
def test_every_problem_is_solved_by_its_reference(config: ToyTask) -> None:
    task = toy_task(config)
    assert (len(task.train), len(task.held_out)) == (config.train_size, config.held_out_size)
    tokenizer = toy_tokenizer()
    for one in (*task.train, *task.held_out):
        assert one.reference is not None
        assert task.reward(one, one.reference) == 1.0
        text = render(*one.messages) + one.reference
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@settings(max_examples=10, deadline=None)
@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), rates=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_sides_share_no_sum_across_runs(seeds: tuple[int, int], rates: tuple[float, float]) -> None:
    one, other = (
        toy_task(ToyTask(train_size=300, held_out_size=100, seed=seed, rule_rate=rate, hint_rate=rate))
        for seed, rate in zip(seeds, rates, strict=True)
    )
    assert not sums(one.train) & sums(other.held_out)
    assert not sums(other.train) & sums(one.held_out)


def test_rates_change_how_sums_are_put_but_not_which() -> None:
    plain = toy_task(ToyTask(train_size=200, held_out_size=50))
    ruled = toy_task(ToyTask(train_size=200, held_out_size=50, rule_rate=0.5, hint_rate=0.5, error_rate=0.5))
    assert [one.messages[-1].content for one in plain.train] == [
        one.messages[-1].content.partition("\n")[0] for one in ruled.train
    ]
    share = sum(one.messages[0] == Message("system", "R") for one in ruled.train) / 200
    assert share == pytest.approx(0.5, abs=0.15)  # four standard deviations: 4 * sqrt(.25 / 200) = .14


def test_a_hidden_rule_is_in_the_answer_and_not_in_the_prompt() -> None:
    task = toy_task(ToyTask(train_size=50, held_out_size=10, rule_rate=1.0, show_rule=False))
    for one in task.train:
        assert [message.role for message in one.messages] == ["user"]
        assert one.answer == str(sum(map(int, one.messages[0].content.split("+"))))[::-1]


def test_too_small_a_world_is_refused() -> None:
    with pytest.raises(ValueError, match=r"toy train: 100 sums asked for, \d+ different ones found"):
        toy_task(ToyTask(min_terms=2, max_terms=2, train_size=100, held_out_size=5))
    with pytest.raises(ValueError, match="max_terms 2 is below min_terms 3"):
        ToyTask(min_terms=3, max_terms=2)
    with pytest.raises(ValueError, match=r"rule_rate 0\.5 needs at least one"):
        ToyTask(rules=(), rule_rate=0.5)


def test_an_unknown_character_is_an_error() -> None:
    with pytest.raises(Exception, match="UNK"):
        toy_tokenizer()("3+x")


def test_a_model_folder_loads_and_is_repeatable(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    state = torch.random.get_rng_state()
    folder = build_toy_model(tmp_path / "a", hidden_size=64, num_layers=1, seed=3)
    again = build_toy_model(tmp_path / "b", hidden_size=64, num_layers=1, seed=3)
    other = build_toy_model(tmp_path / "c", hidden_size=64, num_layers=1, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)

    model, same, different = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, again, other))
    assert (model.dtype, model.config.model_type, model.config.head_dim) == (torch.float32, "qwen3", 32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.model.embed_tokens.weight, different.model.embed_tokens.weight)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))] == list(VOCABULARY)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 2
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "3+5"}], add_generation_prompt=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "3", "+", "5", ":"]
    logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, 5, len(VOCABULARY))


def test_heads_must_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size 48 is not a multiple of the head width 32"):
        build_toy_model(tmp_path, hidden_size=48)
