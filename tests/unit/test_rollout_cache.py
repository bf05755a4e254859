"""The cache that grows in place holds what transformers' own holds, to the bit, also after rows have left it."""

import torch
from transformers import AutoConfig, DynamicCache

from student_trainer.rollout.cache import ROOM, RoomyLayer, roomy_cache
from student_trainer.study.toy import build_toy_model

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
