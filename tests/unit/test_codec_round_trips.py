"""Every record comes back from the codec as it went, and no bytes raise anything but InvalidRequest."""

from __future__ import annotations

import contextlib
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from protos import codec
from protos.errors import ERRORS, InvalidRequest, TeacherError
from protos.records import (
    Chat,
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    Message,
    PrivilegedIds,
    Reference,
    Sample,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    SystemText,
    TeacherInfo,
    TokenizerFingerprint,
    TransferredTensor,
    UserPrefix,
    UserSuffix,
    WeightsTransfer,
    WeightsUpdate,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
COUNT = st.integers(0, 2**31 - 1)
FLOAT = st.floats()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def ids(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays(np.int32, shape)


def floats(*shape: int, width: Literal[16, 32] = 32) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays(np.float32, shape, elements=st.floats(width=width))


LENGTH = st.integers(0, 5)
SOME_IDS = LENGTH.flatmap(ids)
CHAT = st.builds(Chat, st.lists(st.builds(Message, TEXT, TEXT), max_size=3).map(tuple))
PRIVILEGED = st.none() | st.one_of(
    st.builds(SystemText, TEXT),
    st.builds(UserPrefix, TEXT),
    st.builds(UserSuffix, TEXT),
    st.builds(Reference, TEXT, TEXT),
    st.builds(PrivilegedIds, SOME_IDS),
)


@st.composite
def score_items(draw: st.DrawFn) -> ScoreItem:
    num_tokens, num_candidates = draw(LENGTH), draw(st.integers(1, 3))
    return ScoreItem(
        prompt=draw(SOME_IDS | CHAT),
        completion_ids=draw(ids(num_tokens)),
        temperature=draw(FLOAT),
        top_k=draw(INT32),
        candidate_ids=draw(st.none() | ids(num_tokens, num_candidates) | ids(1, num_candidates)),
        entropy=draw(st.booleans()),
        privileged=draw(PRIVILEGED),
        teacher=draw(TEXT),
        half_precision=draw(st.booleans()),
    )


GENERATE_ITEMS = st.builds(
    GenerateItem,
    prompt=SOME_IDS | CHAT,
    prefix_ids=SOME_IDS,
    max_new_tokens=INT32,
    temperature=FLOAT,
    top_p=FLOAT,
    top_k=INT32,
    num_samples=INT32,
    seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    stop_token_ids=st.lists(INT32, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    privileged=PRIVILEGED,
    teacher=TEXT,
)


@st.composite
def score_results(draw: st.DrawFn) -> ScoreResult:
    num_tokens, top_k, num_candidates = draw(LENGTH), draw(LENGTH), draw(LENGTH)
    half_precision = draw(st.booleans())
    width = 16 if half_precision else 32
    return ScoreResult(
        sampled_logprobs=draw(floats(num_tokens)),
        top_ids=draw(ids(num_tokens, top_k)),
        top_logprobs=draw(floats(num_tokens, top_k, width=width)),
        candidate_logprobs=draw(floats(num_tokens, num_candidates, width=width)),
        entropy=draw(st.none() | floats(num_tokens)),
        weights_version=draw(st.integers(0, 2**63 - 1)),
        num_context_tokens=draw(COUNT),
        num_cached_tokens=draw(COUNT),
        queue_s=draw(FLOAT),
        engine_s=draw(FLOAT),
        completion_crc32=draw(st.integers(0, 2**32 - 1)),
        half_precision=half_precision,
    )


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    num_tokens = draw(LENGTH)
    return Sample(
        draw(ids(num_tokens)), draw(floats(num_tokens)), draw(st.sampled_from(["stop", "length"])), draw(TEXT)
    )


GENERATE_RESULTS = st.builds(
    GenerateResult,
    samples=st.lists(samples(), max_size=3).map(tuple),
    weights_version=COUNT,
    num_context_tokens=COUNT,
    num_cached_tokens=COUNT,
    queue_s=FLOAT,
    engine_s=FLOAT,
)
ERROR = st.builds(
    lambda name, message, field, retry: ERRORS[name](message, field=field, retry_after_s=retry),
    st.sampled_from(list(ERRORS)),
    TEXT,
    TEXT,
    st.none() | st.floats(0.1, 100),
)
NAMES = st.lists(TEXT, max_size=3).map(tuple)
INFO = st.builds(
    TeacherInfo,
    teachers=NAMES,
    model=TEXT,
    revision=TEXT,
    weights_version=COUNT,
    tokenizer=st.builds(TokenizerFingerprint, COUNT, TEXT, TEXT, st.lists(INT32, max_size=3).map(tuple), TEXT),
    max_context_tokens=COUNT,
    max_top_k=COUNT,
    max_candidates=COUNT,
    max_items=COUNT,
    supports=NAMES,
    exact_temperature=st.booleans(),
    prefix_cache=st.booleans(),
    dtype=TEXT,
    engine=TEXT,
    engine_version=TEXT,
    score_path=TEXT,
    determinism=TEXT,
    privileged_kinds=NAMES,
    reference_templates=NAMES,
    weights_transfer=TEXT,
    num_workers=COUNT,
)


def assert_same(a: Any, b: Any) -> None:
    """Equal in type, shape, dtype and bits, NaN included, at any depth."""
    assert type(a) is type(b)
    if isinstance(a, TeacherError):
        assert (a.message, a.field, a.retry_after_s) == (b.message, b.field, b.retry_after_s)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif is_dataclass(a):
        for field in fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float):
        np.testing.assert_equal(a, b)
    else:
        assert a == b


@given(st.builds(ScoreRequest, st.lists(score_items(), max_size=3).map(tuple), COUNT))
def test_score_requests_round_trip(request: ScoreRequest) -> None:
    assert_same(codec.decode_score_request(codec.encode_score_request(request)), request)


@given(st.builds(GenerateRequest, st.lists(GENERATE_ITEMS, max_size=3).map(tuple), COUNT))
def test_generate_requests_round_trip(request: GenerateRequest) -> None:
    assert_same(codec.decode_generate_request(codec.encode_generate_request(request)), request)


@given(COUNT, score_results() | ERROR)
def test_score_replies_round_trip(index: int, outcome: ScoreResult | TeacherError) -> None:
    assert_same(codec.decode_score_reply(codec.encode_score_reply(index, outcome)), (index, outcome))


@given(COUNT, GENERATE_RESULTS | ERROR)
def test_generate_replies_round_trip(index: int, outcome: GenerateResult | TeacherError) -> None:
    assert_same(codec.decode_generate_reply(codec.encode_generate_reply(index, outcome)), (index, outcome))


@given(INFO)
def test_info_round_trips(info: TeacherInfo) -> None:
    assert_same(codec.decode_info(codec.encode_info(info)), info)


@given(ERROR)
def test_errors_round_trip(error: TeacherError) -> None:
    assert_same(codec.decode_error(codec.encode_error(error)), error)


DECODERS = [
    codec.decode_score_request,
    codec.decode_generate_request,
    codec.decode_score_reply,
    codec.decode_generate_reply,
    codec.decode_info,
    codec.decode_error,
]


WEIGHTS_UPDATES = st.builds(
    WeightsUpdate,
    teacher=TEXT,
    version=st.integers(-(2**63), 2**63 - 1),
    path=TEXT,
    adapter_config=TEXT,
    ema_decay=st.none() | st.floats(allow_nan=False),
    transfer=st.none()
    | st.builds(
        WeightsTransfer,
        backend=TEXT,
        rendezvous=TEXT,
        tensors=st.lists(
            st.builds(
                TransferredTensor,
                name=TEXT,
                dtype=TEXT,
                shape=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
            ),
            max_size=3,
        ).map(tuple),
    ),
)


@given(WEIGHTS_UPDATES)
def test_weights_updates_round_trip(update: WeightsUpdate) -> None:
    assert codec.decode_weights_part(codec.encode_weights_update(update)) == update


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=60))
def test_arbitrary_bytes_raise_only_invalid_request(decode: Any, data: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        decode(data)


@given(st.data(), score_items())
def test_a_damaged_request_raises_only_invalid_request(data: st.DataObject, item: ScoreItem) -> None:
    message = bytearray(codec.encode_score_request(ScoreRequest((item,))))
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(InvalidRequest):
        codec.decode_score_request(bytes(message))


@given(st.data(), COUNT, score_results() | GENERATE_RESULTS)
def test_a_damaged_result_is_never_another_result(
    data: st.DataObject, index: int, result: ScoreResult | GenerateResult
) -> None:
    if isinstance(result, ScoreResult):
        encode, decode = codec.encode_score_reply, codec.decode_score_reply
    else:
        encode, decode = codec.encode_generate_reply, codec.decode_generate_reply
    message = bytearray(encode(index, result))  # pyright: ignore[reportArgumentType]
    message[data.draw(st.integers(0, len(message) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(InvalidRequest):
        got_index, got = decode(bytes(message))
        # One flipped byte may still turn the result into an error; protos.verify checks the completion's own checksum.
        if isinstance(got, ScoreResult) and isinstance(result, ScoreResult):
            got = replace(got, completion_crc32=result.completion_crc32)
        if not isinstance(got, TeacherError):
            assert_same((got_index, got), (index, result))
