"""The loss by chunks against the loss of all logits at once, over the families that do something to them."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3Config,
)

from student_trainer import lm_head
from student_trainer.collate import Batch, collate, completion_logits
from student_trainer.lm_head import LmHead, completion_hidden, find_head, logit_chunks
from student_trainer.losses import log_probs, token_mean
from tests.families import SHAPE, V, build

FAMILIES = {
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, final_logit_softcapping=3.0, attn_logit_softcapping=None),
    "gemma3": Gemma3TextConfig(**SHAPE, final_logit_softcapping=None),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "cohere": CohereConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}, logit_scale=0.25),
}


def build_batch() -> Batch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, V, size).astype(np.int32) for size in (5, 2, 7, 1)]
    completions = [rng.integers(3, V, size).astype(np.int32) for size in (4, 9, 1, 6)]
    return collate(prompts, completions)


def negative_log_likelihood(logits_BTV: Tensor, batch: Batch) -> Tensor:
    return -log_probs(logits_BTV, 0.7).gather(-1, batch.completion_ids_BT[..., None])[..., 0]


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def plain(model: PreTrainedModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = token_mean(negative_log_likelihood(completion_logits(model, batch), batch), batch.mask_BT)
    loss.backward()
    return loss.item(), gradients(model)


def chunked(
    model: PreTrainedModel, head: LmHead, batch: Batch, micro_batch_size: int = 4
) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    for micro in batch.split(micro_batch_size):
        for logits, tokens in logit_chunks(model, head, completion_hidden(model, micro), micro):
            loss = token_mean(negative_log_likelihood(logits, tokens), tokens.mask_BT, batch.num_tokens)
            loss.backward()
            total += loss.item()
    return total, gradients(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_are_those_of_all_logits_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 3 * V)  # 20 tokens: 6 chunks of 3 and one of 2
    # Gemma's and Cohere's norms compute in float32, whatever the model's precision.
    double = 1e-12 if family in ("qwen3", "llama", "granite") else 1e-6
    for dtype, atol in ((torch.float64, double), (torch.float32, 1e-6)):
        model, batch = build(FAMILIES[family], dtype), build_batch()
        head = find_head(model)
        loss, expected = plain(model, batch)
        for micro_batch_size in (4, 3, 1):
            chunked_loss, actual = chunked(model, head, batch, micro_batch_size)
            assert chunked_loss == pytest.approx(loss, abs=atol)
            assert actual.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(actual[name], gradient, rtol=atol, atol=atol)


def test_the_cap_and_the_scale_are_found_and_matter() -> None:
    for family, name in (("gemma2", "_capped"), ("granite", "div"), ("cohere", "mul"), ("llama", None)):
        finish = find_head(build(FAMILIES[family])).finish
        assert (finish.func.__name__ if isinstance(finish, partial) else None) == name
        logits = torch.tensor([8.0])
        # 3 tanh(8/3), 8/4, 8 * 0.25, 8
        expected = {"gemma2": 3 * np.tanh(8 / 3), "granite": 2.0, "cohere": 2.0, "llama": 8.0}[family]
        assert finish(logits).item() == pytest.approx(expected, rel=1e-6)


def test_a_fresh_models_tiny_logits_do_not_hide_the_cap() -> None:
    config = copy.deepcopy(FAMILIES["gemma2"])
    config.final_logit_softcapping = 1e4
    finish = find_head(AutoModelForCausalLM.from_config(config)).finish
    assert isinstance(finish, partial)


def test_peft_models_train_by_chunks_too() -> None:
    model = get_peft_model(build(FAMILIES["llama"]), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    batch = build_batch()
    model.eval()
    loss, expected = plain(model, batch)  # pyright: ignore[reportArgumentType]
    chunked_loss, actual = chunked(model, find_head(model), batch)  # pyright: ignore[reportArgumentType]
    assert chunked_loss == pytest.approx(loss, abs=1e-12)
    assert actual.keys() == expected.keys()
    assert {name.split(".")[-3] for name in actual} == {"lora_A", "lora_B"}
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=1e-12)


def test_without_gradients_the_chunks_are_the_logits_and_nothing_is_left_behind() -> None:
    model, batch = build(FAMILIES["gemma2"]), build_batch()
    with torch.no_grad():
        [(logits, tokens)] = list(logit_chunks(model, find_head(model), completion_hidden(model, batch), batch))
        torch.testing.assert_close(logits[0], completion_logits(model, batch)[batch.mask_BT], rtol=0, atol=1e-12)
    assert tokens.completion_ids_BT[0].tolist() == batch.completion_ids_BT[batch.mask_BT].tolist()
    head = model.get_output_embeddings()
    assert head is not None
    assert not head._forward_pre_hooks
    assert gradients(model) == {}


class MostLogits(TorchDispatchMode):
    """The most rows of any full-width tensor [..., V] that was made; the head's transposed weight, [D, V], is none."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape[-1:] == (V,) and result.shape[:-1] != (SHAPE["hidden_size"],):
            self.rows = max(self.rows, result.numel() // V)
        return result


def test_no_tensor_is_full_width_for_more_tokens_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 3 * V)
    model, batch = build(FAMILIES["llama"]), build_batch()
    head = find_head(model)
    with MostLogits() as all_at_once:
        plain(model, batch)
    with MostLogits() as by_chunks:
        chunked(model, head, batch)
    assert all_at_once.rows == 4 * 10  # 4 sequences of at most 9 tokens, and the row after
    assert by_chunks.rows == 3


def test_a_model_that_does_something_else_to_its_logits_is_refused() -> None:
    model = build(FAMILIES["llama"])
    model.register_forward_hook(lambda _m, _a, output: output.__class__(logits=output.logits.square()))
    with pytest.raises(ValueError, match="LlamaForCausalLM does more between its LM head and its logits"):
        find_head(model)
