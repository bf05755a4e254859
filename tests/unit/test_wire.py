"""Framing: what went in comes out however the stream was cut."""

from __future__ import annotations

import pytest
from google.protobuf.internal.decoder import _DecodeVarint32  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import MAX_MESSAGE_BYTES, FrameReader, frame


@given(st.lists(st.binary(max_size=300), max_size=5), st.integers(1, 50))
def test_frames_survive_any_cut(messages: list[bytes], chunk_size: int) -> None:
    stream = b"".join(map(frame, messages))
    reader = FrameReader()
    out = [m for i in range(0, len(stream), chunk_size) for m in reader.feed(stream[i : i + chunk_size])]
    reader.finish()
    assert out == messages


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384])
def test_the_prefix_is_protobuf_s_varint(length: int) -> None:
    framed = frame(b"x" * length)
    decoded, start = _DecodeVarint32(framed, 0)
    assert (decoded, len(framed) - start) == (length, length)


def test_a_cut_stream_is_noticed() -> None:
    reader = FrameReader()
    assert reader.feed(frame(b"whole") + frame(b"broken")[:-1]) == [b"whole"]
    with pytest.raises(ValueError, match="ended inside a message, after 6 bytes"):
        reader.finish()


def test_a_length_that_cannot_be_is_refused_before_its_bytes_arrive() -> None:
    too_long = frame(b"")[:0] + bytes([0xFF, 0xFF, 0xFF, 0xFF, 0x0F])  # 2**32 - 1
    with pytest.raises(ValueError, match=f"{2**32 - 1} bytes; the limit is {MAX_MESSAGE_BYTES}"):
        FrameReader().feed(too_long)
    with pytest.raises(ValueError, match="more than 5 bytes"):
        FrameReader().feed(b"\xff" * 5)
