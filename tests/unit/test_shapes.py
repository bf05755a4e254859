"""Families of models whose special tokens, templates, heads and attention differ, through the trainer's every step."""

import numpy as np
import pytest
import torch

from protos.records import Message
from student_trainer.collate import collate, completion_logits
from student_trainer.config import ConfigError, ModelConfig, parse_config
from student_trainer.learner import Learner
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.stages.sft import Sft
from student_trainer.student import load_student
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt
from teacher_server.tokenizer import ChatTokenizer
from tests.tiny_model import SHAPES, build_tiny_shape

EOS_AND_TURN_END = {"qwen3-base": (256, 258), "llama": (257, 259), "gemma3": (257, 259)}
"""After the 256 bytes come the special tokens, in the order in which tiny_model names them."""

PROBLEMS = [
    Problem(f"p{i}", (Message("user", text),), answer, answer)
    for i, (text, answer) in enumerate([("2+2?", "4"), ("Which colour has the sky?", "blue"), ("a", "a longer text")])
]


@pytest.fixture(scope="module", params=[(shape, tied) for shape in SHAPES for tied in (True, False)], ids=str)
def folder(request, tmp_path_factory):
    shape, tied = request.param
    return build_tiny_shape(tmp_path_factory.mktemp(shape), shape, tied=tied)


def shape_of(folder):
    return next(shape for shape in SHAPES if folder.name.startswith(shape))


def learner_of(student, folder):
    return Learner.build(
        student,
        parse_config(
            {
                "run": "unused",
                "steps": 4,
                "problems_per_step": 3,
                "model": {"path": str(folder)},
                "task": {"kind": "toy"},
                "stage": {"kind": "sft"},
                "optim": {"lr": 1e-2, "warmup_steps": 0},
            }
        ),
    )


def test_the_turns_end_is_learnt_and_no_special_token_is_added_twice(folder):
    student = load_student(ModelConfig(path=str(folder)))
    eos, turn_end = EOS_AND_TURN_END[shape_of(folder)]
    assert student.turn_end_id == turn_end
    assert student.eos_token_ids == (eos, turn_end) == ChatTokenizer.load(str(folder)).eos_token_ids
    batch = Sft(student, PROBLEMS, problems_per_step=3, seed=0).collect(0).batch
    for row in range(3):
        assert batch.completion_ids_BT[row][batch.mask_BT[row]][-1] == turn_end
        assert int((batch.completion_ids_BT[row][batch.mask_BT[row]] >= 256).sum()) == 1
        if student.tokenizer.bos_token_id is not None:
            prompt = batch.prompt_ids_BN[row][batch.prompt_mask_BN[row].bool()].tolist()
            assert prompt.index(256) == 0
            assert prompt.count(256) == 1


def test_padded_logits_are_those_of_the_sequence_alone(folder):
    student = load_student(ModelConfig(path=str(folder)))
    prompts = [render_prompt(student.tokenizer, problem.messages) for problem in PROBLEMS]
    completions = [np.arange(3 + 5 * i, dtype=np.int32) for i in range(3)]
    with torch.no_grad():
        logits_BTV = completion_logits(student.model.eval(), collate(prompts, completions))
        for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
            alone = student.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(logits_BTV[b, : len(completion)], alone, atol=1e-5, rtol=0)
            assert alone.std() > 0.1  # far above the tolerance


def test_a_step_lowers_the_loss_a_rollout_has_its_log_probs_and_a_checkpoint_is_the_model(folder, tmp_path):
    student = load_student(ModelConfig(path=str(folder)))
    learner = learner_of(student, folder)
    stage = Sft(student, PROBLEMS, problems_per_step=3, seed=0)
    losses = [learner.step(stage, stage.collect(step))["loss"] for step in (0, 0, 0)]
    assert losses[2] < losses[1] < losses[0]

    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    for rollout in sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=12), seeds=[0, 1, 2]):
        ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))[None]
        with torch.no_grad():
            logp_TV = student.model.eval()(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logp_TV[torch.arange(len(rollout.completion_ids)), rollout.completion_ids]
        np.testing.assert_allclose(rollout.logprobs, expected, atol=1e-4)

    learner.save(tmp_path, 3, stage, keep=1)
    loaded = load_student(ModelConfig(path=str(tmp_path / "step-00000003")))
    assert loaded.fingerprint == student.fingerprint
    assert loaded.model.generation_config.eos_token_id == list(student.eos_token_ids)
    before, after = student.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())


def test_a_base_model_without_a_template_takes_a_built_in_one_or_a_file(tmp_path):
    bare = build_tiny_shape(tmp_path, "llama", tied=True, template=False)
    with pytest.raises(ConfigError, match=r'no chat template: set model\.chat_template to "plain"'):
        load_student(ModelConfig(path=str(bare)))
    plain = load_student(ModelConfig(path=str(bare), chat_template="plain"))
    ids = render_prompt(plain.tokenizer, (Message("system", "Be brief."), Message("user", "2+2?")))
    assert plain.tokenizer.decode(ids) == "<|begin_of_text|>Be brief.\n\nUser:\n2+2?\n\nAssistant:\n"
    assert plain.turn_end_id == plain.tokenizer.eos_token_id
    with pytest.raises(ConfigError, match=r"needs <\|im_end\|> and <\|im_start\|>, which the tokenizer lacks"):
        load_student(ModelConfig(path=str(bare), chat_template="chatml"))
    with pytest.raises(ConfigError, match="'alpaca' is neither a file nor one of"):
        load_student(ModelConfig(path=str(bare), chat_template="alpaca"))
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}{% for message in messages %}{{ message['content'] }}|{% endfor %}")
    own = load_student(ModelConfig(path=str(bare), chat_template=str(file)))
    assert own.tokenizer.decode(render_prompt(own.tokenizer, (Message("user", "x"),))) == "<|begin_of_text|>x|"


def test_chatml_is_for_models_that_have_its_tokens(tmp_path):
    bare = build_tiny_shape(tmp_path, "qwen3-base", tied=True, template=False)
    student = load_student(ModelConfig(path=str(bare), chat_template="chatml"))
    assert student.turn_end_id == 258  # <|im_end|>, and not the tokenizer's EOS, 256
