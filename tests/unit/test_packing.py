"""Packed texts against texts alone in their rows: equal loss, equal gradients, and no text sees another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from student_trainer.collate import Batch, collate, first_fit_decreasing
from student_trainer.config import ModelConfig, parse_config
from student_trainer.learner import Learner
from student_trainer.lm_head import check_packing, completion_hidden, find_head, logit_chunks
from student_trainer.losses import log_probs, token_mean
from student_trainer.stages.sft import Sft
from student_trainer.student import load_student
from student_trainer.study.toy import build_toy_model
from student_trainer.tasks import ToyTask, build_task
from tests.families import SHAPE, V, build

FAMILIES = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE),
    # A window of 4 tokens, shorter than the texts, in every other layer.
    "gemma2": Gemma2Config(**SHAPE, attn_logit_softcapping=None, sliding_window=4),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
}
LENGTHS = ((5, 8), (2, 3), (7, 1), (1, 2), (3, 6), (2, 1))
"""Prompt and completion tokens: 13, 5, 8, 3, 9 and 3, which fit into rows of 13 as 13, 9 + 3, 8 + 5 and 3."""


def texts(seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    prompts, completions = zip(
        *((rng.integers(3, V, n).astype(np.int32), rng.integers(3, V, t).astype(np.int32)) for n, t in LENGTHS),
        strict=True,
    )
    return list(prompts), list(completions)


def loss_and_gradients(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    total, head = 0.0, find_head(model)
    for micro in batch.split(4):
        for logits, tokens in logit_chunks(model, head, completion_hidden(model, micro), micro):
            logp_BT = log_probs(logits, 1.0).gather(-1, tokens.completion_ids_BT[..., None])[..., 0]
            loss = token_mean(-logp_BT, tokens.mask_BT, batch.num_tokens)
            loss.backward()
            total += loss.item()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_texts_alone_in_their_rows(family: str) -> None:
    for dtype in (torch.float64, torch.float32):
        model, batch = build(FAMILIES[family], dtype), collate(*texts())
        loss, expected = loss_and_gradients(model, batch)
        packed_loss, actual = loss_and_gradients(model, batch.packed())
        assert packed_loss == pytest.approx(loss, abs=1e-6)
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_text_never_sees_its_neighbours(family: str) -> None:
    """All texts but one are changed, before and behind it in its row: not one bit of its hidden states is another."""
    model = build(FAMILIES[family], torch.float32)
    prompts, completions = texts(0)
    other_prompts, other_completions = texts(1)
    lengths = [len(completion) for completion in completions]
    whole = completion_hidden(model, collate(prompts, completions).packed()).split(lengths)
    for kept in range(len(LENGTHS)):
        mixed = collate(
            [p if b == kept else o for b, (p, o) in enumerate(zip(prompts, other_prompts, strict=True))],
            [c if b == kept else o for b, (c, o) in enumerate(zip(completions, other_completions, strict=True))],
        )
        hidden = completion_hidden(model, mixed.packed()).split(lengths)
        assert hidden[kept].equal(whole[kept])
        assert not any(hidden[b].equal(whole[b]) for b in range(len(LENGTHS)) if b != kept)


def test_rows_are_few_no_wider_than_the_longest_and_hold_every_token_once() -> None:
    inputs = collate(*texts()).packed().model_inputs()
    assert inputs.ids_RW.shape == (4, 13)
    assert inputs.attention_mask_RW is None
    # 9 + 3 and a padding of 1; 8 + 5; 3 and a padding of 10: each starts at 0.
    assert inputs.position_ids_RW[1].tolist() == [*range(9), *range(3), 0]
    assert inputs.position_ids_RW[2].tolist() == [*range(8), *range(5)]
    assert inputs.position_ids_RW[3].tolist() == [*range(3), *range(10)]
    prompts, completions = texts()
    at = 0
    for prompt, completion in zip(prompts, completions, strict=True):
        row, first = inputs.row_N[at], inputs.column_N[at]  # of the prompt's last token
        found = inputs.ids_RW[row, first + 1 - len(prompt) : first + 1 + len(completion)]
        assert found.tolist() == [*prompt, *completion]
        at += len(completion)
    assert at == len(inputs.row_N)


def test_first_fit_decreasing_leaves_room_in_the_last_row_alone() -> None:
    assert first_fit_decreasing([4, 4, 1, 3, 2], 6) == [[0, 4], [1, 2], [3]]
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 200).tolist()
    rows = first_fit_decreasing(lengths, 100)
    assert sorted(b for row in rows for b in row) == list(range(200))
    assert all(sum(lengths[b] for b in row) <= 100 for row in rows)
    assert len(rows) <= 11 / 9 * sum(lengths) / 100 + 1


def test_the_stage_takes_the_same_step_packed(tmp_path: Any) -> None:
    path = build_toy_model(tmp_path / "model", hidden_size=32, num_layers=1)
    task = build_task(ToyTask(train_size=50, held_out_size=10))
    outcomes = []
    for packing in (False, True):
        student = load_student(ModelConfig(path=str(path)))
        config = parse_config(
            {
                "run": "unused",
                "steps": 3,
                "model": {"path": str(path)},
                "task": {"kind": "toy"},
                "stage": {"kind": "sft", "packing": packing},
                "optim": {"lr": 1e-2, "micro_batch_size": 5, "warmup_steps": 0},
            }
        )
        learner, stage = (
            Learner.build(student, config),
            Sft(student, task.train, problems_per_step=8, seed=0, packing=packing),
        )
        outcomes.append([learner.step(stage, stage.collect(step)) for step in range(3)])
    for alone, packed in zip(*outcomes, strict=True):
        for name in ("loss", "grad_norm", "token_accuracy", "num_tokens"):
            assert packed[name] == pytest.approx(alone[name], abs=1e-5)


def test_models_that_keep_texts_apart_are_found_out() -> None:
    for family in FAMILIES:
        check_packing(build(FAMILIES[family], torch.float32))
    shape: dict[str, Any] = {"vocab_size": V, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    leaky = AutoModelForCausalLM.from_config(MambaConfig(**shape, state_size=4))
    with pytest.raises(ValueError, match=r"MambaForCausalLM lets a text see .*: set stage\.packing to false"):
        check_packing(leaky)
