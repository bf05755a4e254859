"""What the codec puts on the wire, and what it refuses by name."""

from __future__ import annotations

import numpy as np
import pytest

from protos import codec
from protos.errors import InvalidRequest
from protos.records import ScoreItem, ScoreRequest
from protos.teacher.v1 import teacher_pb2 as pb
from tests.records import score_result


def test_a_flipped_bit_of_a_logprob_is_named() -> None:
    message = pb.ScoreResponse.FromString(codec.encode_score_reply(0, score_result(np.zeros(1))))
    message.result.sampled_logprobs = np.array([-1e-9], "<f4").tobytes()
    with pytest.raises(InvalidRequest, match="damaged on its way: CRC-32"):
        codec.decode_score_reply(message.SerializeToString())


ONE = np.array([1], "<i4").tobytes()


@pytest.mark.parametrize(
    ("item", "field", "words"),
    [
        (pb.ScoreItem(prompt_ids=pb.TokenIds(ids=b"123")), "prompt_ids", "3 bytes"),
        (pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE), completion_ids=b"12345"), "completion_ids", "5 bytes"),
        (
            # T = 1 and M = 2 need 1 * 2 * 4 = 8 bytes.
            pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE), completion_ids=ONE, num_candidates=2, candidate_ids=ONE),
            "candidate_ids",
            "4 bytes; int32 of shape [1, 2] is 8 bytes",
        ),
        (
            pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE), completion_ids=ONE, candidate_ids=ONE),
            "candidate_ids",
            "shape [1, 0] is 0 bytes",
        ),
        (
            pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE), num_candidates=-1),
            "candidate_ids",
            "[0, -1]",
        ),
        (pb.ScoreItem(completion_ids=ONE), "prompt", "no prompt"),
        (
            pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE), privileged=pb.Privileged()),
            "privileged",
            "give one of",
        ),
    ],
)
def test_a_wrong_item_names_its_field_and_numbers(item: pb.ScoreItem, field: str, words: str) -> None:
    good = pb.ScoreItem(prompt_ids=pb.TokenIds(ids=ONE))
    with pytest.raises(InvalidRequest) as caught:
        codec.decode_score_request(pb.ScoreRequest(items=[good, item]).SerializeToString())
    assert caught.value.field == f"items[1].{field}"
    assert words in caught.value.message


IDS = np.array([1], np.int32)


@pytest.mark.parametrize(
    ("item", "field"),
    [
        (ScoreItem(IDS, np.array([2**31])), "items[0].completion_ids"),
        (ScoreItem(IDS, np.array([1.0])), "items[0].completion_ids"),  # pyright: ignore[reportArgumentType]
        (ScoreItem(np.array([[1]], np.int32), IDS), "items[0].prompt_ids"),
        (ScoreItem(IDS, IDS, candidate_ids=np.zeros((2, 3), np.int32)), "items[0].candidate_ids"),
        (ScoreItem(IDS, IDS, candidate_ids=np.zeros(1, np.int32)), "items[0].candidate_ids"),
        (ScoreItem(IDS, IDS, top_k=2**31), "items[0]"),
    ],
)
def test_what_the_wire_cannot_hold_is_refused_where_it_is_written(item: ScoreItem, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        codec.encode_score_request(ScoreRequest((item,)))
    assert caught.value.field == field


@pytest.mark.parametrize(("half_precision", "per_token"), [(False, 4 + 20 * (4 + 4)), (True, 4 + 20 * (4 + 2))])
def test_bytes_per_token(half_precision: bool, per_token: int) -> None:
    # One float32 for the sampled log-prob, then an int32 id and a log-prob for each of K = 20; the rest is per item.
    num_tokens = 200
    rows = np.zeros((num_tokens, 20))
    result = score_result(
        np.zeros(num_tokens),
        top_ids=rows.astype(np.int32),
        top_logprobs=rows.astype(np.float32),
        weights_version=1,
        num_context_tokens=100,
        num_cached_tokens=96,
        queue_s=0.1,
        engine_s=0.1,
        completion_crc32=1,
        half_precision=half_precision,
    )
    num_bytes = len(codec.encode_score_reply(0, result))
    assert per_token * num_tokens < num_bytes < per_token * num_tokens + 80


def test_arrays_are_little_endian_views() -> None:
    request = ScoreRequest((ScoreItem(np.array([1, 256], ">i4"), np.array([-1], np.int64)),))  # pyright: ignore[reportArgumentType]
    data = codec.encode_score_request(request)
    message = pb.ScoreRequest.FromString(data)
    assert message.items[0].prompt_ids.ids == bytes([1, 0, 0, 0, 0, 1, 0, 0])
    assert message.items[0].completion_ids == b"\xff\xff\xff\xff"
    item = codec.decode_score_request(data).items[0]
    assert not item.completion_ids.flags.owndata
    assert not item.completion_ids.flags.writeable


def test_an_unknown_error_name_keeps_its_name() -> None:
    error = codec.decode_error(pb.Error(name="Teapot", message="short and stout").SerializeToString())
    assert (error.name, error.message) == ("EngineFailed", "Teapot: short and stout")
