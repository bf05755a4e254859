"""The cache that grows in place holds what transformers' own holds, to the bit, also after rows have left it."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from student_trainer.rollout.cache import ROOM, RoomyLayer, roomy_cache, takes_ready_mask
from student_trainer.study.toy import build_toy_model
from tests.tiny_model import build_tiny_shape

LENGTH = 6 * ROOM


def test_it_holds_what_transformers_own_cache_holds(tmp_path):
    config = AutoConfig.from_pretrained(build_toy_model(tmp_path, hidden_size=32, num_layers=1))
    roomy, plain = roomy_cache(config), DynamicCache(config=config)
    [layer] = roomy.layers
    assert isinstance(layer, RoomyLayer)
    generator = torch.Generator().manual_seed(0)
    num_rows, buffers = 4, set()
    for t in range(LENGTH):
        # The prompt has three tokens, and every other step one.
        shape = (num_rows, 1, 3 if t == 0 else 1, 32)
        keys, values = torch.randn(2, *shape, generator=generator)
        for got, expected in zip(roomy.update(keys, values, 0), plain.update(keys, values, 0), strict=True):
            assert torch.equal(got, expected)
        assert roomy.get_seq_length() == plain.get_seq_length() == t + 3
        assert layer.keys is not None
        buffers.add(layer.keys.data_ptr())
        if t in (1, ROOM + 5):
            stays = torch.arange(num_rows) != 1
            num_rows -= 1
            roomy.batch_select_indices(stays)
            plain.batch_select_indices(stays)
    # A buffer holds 64 tokens more than it must, and from 256 on a quarter more: 67, 132, 197, 262, 328 and 411 tokens
    # are six, and two more come of the rows that left.
    assert len(buffers) <= 8


def test_a_ready_made_mask_is_what_transformers_makes_of_the_padding(tmp_path):
    """One more token after prompts of 3 and 5 tokens, in a model whose layers all keep every token."""
    model = AutoModelForCausalLM.from_pretrained(build_tiny_shape(tmp_path, "llama", tied=False)).eval()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    ids = torch.arange(12).view(2, 6)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    logits = []
    for last in (mask, mask[:, None, None].bool()):
        cache = roomy_cache(model.config)
        assert takes_ready_mask(model, cache)
        with torch.inference_mode():
            model(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], past_key_values=cache)
            logits.append(
                model(ids[:, 5:], attention_mask=last, position_ids=positions[:, 5:], past_key_values=cache).logits
            )
    assert torch.equal(*logits)


def test_no_mask_is_made_ready_where_layers_differ_or_attention_adds_its_mask(tmp_path):
    gemma = AutoModelForCausalLM.from_pretrained(build_tiny_shape(tmp_path, "gemma3", tied=False))
    assert not takes_ready_mask(gemma, roomy_cache(gemma.config))
    llama = build_tiny_shape(tmp_path, "llama", tied=False)
    eager = AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    assert not takes_ready_mask(eager, roomy_cache(eager.config))
