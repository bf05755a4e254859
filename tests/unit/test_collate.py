import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.collate import collate, completion_logits
from student_trainer.study.toy import build_toy_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=64)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


PROMPTS = [np.array([1, 5, 6, 7, 15], np.int32), np.array([1, 9], np.int32), np.array([1, 4, 13, 4], np.int32)]
COMPLETIONS = [np.array([8, 9], np.int32), np.array([5, 6, 7, 2], np.int32), np.array([3], np.int32)]


def test_padding_is_left_for_prompts_and_right_for_completions():
    batch = collate(PROMPTS, COMPLETIONS, sampled_logp_BT=[np.zeros(len(c), np.float32) for c in COMPLETIONS])
    assert batch.prompt_ids_BN.tolist()[1] == [0, 0, 0, 1, 9]
    assert batch.prompt_mask_BN.tolist()[1] == [0, 0, 0, 1, 1]
    assert batch.completion_ids_BT.tolist()[0] == [8, 9, 0, 0]
    assert batch.mask_BT.sum(-1).tolist() == [2, 4, 1]
    assert batch.num_tokens == 7
    assert batch.sampled_logp_BT is not None
    assert torch.equal(batch.sampled_logp_BT.isnan(), ~batch.mask_BT)


def test_lists_of_ids_are_padded_with_the_pad_id():
    top = [np.full((len(c), 3), 4, np.int32) for c in COMPLETIONS]
    batch = collate(PROMPTS, COMPLETIONS, student_top_BTK=top)
    assert batch.student_top_BTK is not None
    assert batch.student_top_BTK[2].tolist() == [[4, 4, 4], [-1, -1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_row_t_predicts_completion_token_t_whatever_the_padding(model):
    """Each row equals that of the sequence alone, unpadded: position N - 1 + t of a plain forward."""
    batch = collate(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        logits_BTV = completion_logits(model, batch)
        for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
            alone = model(input_ids=ids).logits[0]
            expected = alone[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
            torch.testing.assert_close(logits_BTV[b, : len(completion)], expected, atol=1e-5, rtol=0)
            shifted = alone[len(prompt) : len(prompt) + len(completion)]
            assert (logits_BTV[b, : len(completion)] - shifted).abs().max() > 1e-2


def test_micro_batches_hold_the_same_logits_with_less_padding(model):
    batch = collate(PROMPTS, COMPLETIONS)
    with torch.no_grad():
        whole = completion_logits(model, batch)
        micros = list(batch.split(2))
        assert [micro.num_sequences for micro in micros] == [2, 1]
        assert micros[1].completion_ids_BT.shape == (1, 1)
        assert micros[1].prompt_ids_BN.shape == (1, 4)
        assert sum(micro.num_tokens for micro in micros) == batch.num_tokens
        torch.testing.assert_close(completion_logits(model, micros[1])[0, 0], whole[2, 0], atol=1e-5, rtol=0)


def test_an_array_with_a_row_too_few_is_refused():
    short = [np.zeros(len(c) - (i == 1), np.float32) for i, c in enumerate(COMPLETIONS)]
    with pytest.raises(ValueError, match="teacher_logp_BT does not have one row for each completion token"):
        collate(PROMPTS, COMPLETIONS, teacher_logp_BT=short)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="every prompt at least one token"):
        collate([np.empty(0, np.int32)], [np.array([3], np.int32)])
