"""What both ends of a transport agree on besides the messages: paths, limits, headers and framing."""

from __future__ import annotations

import zlib
from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import quote

from protos.errors import Corrupted

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""The largest request and the largest single reply, on both sides of both transports. A rollout batch of 1,024 items
of 32k tokens is 128 MiB of ids, so nothing sensible meets the limit; a runaway body does."""

GRPC_SERVICE = "teacher.v1.TeacherService"
ERROR_METADATA_KEY = "teacher-error-bin"
"""The trailing metadata that holds a serialised Error beside gRPC's own status."""

GRPC_LIMITS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 64 * 1024),
)
"""Channel and server options; the metadata must hold an Error (see codec.MAX_ERROR_CHARS) beside the status text."""

PROTOBUF_TYPE = "application/x-protobuf"
JSON_TYPE = "application/json"
MAX_CHUNK_BYTES = 512 * 1024
"""What one message of an upload carries: half of the smallest limit that a server can set on a message."""

TIMEOUT_HEADER = "x-timeout-s"
"""The caller's deadline over HTTP, in seconds from now; gRPC has its own."""
AUTHORIZATION = "authorization"
"""The header, and gRPC's metadata, of a bearer token (RFC 6750)."""
CLIENT_HEADER = "x-client-id"
"""The header, and gRPC's metadata, by which a caller without a token names itself to the queue, which is fair."""

BODY_CRC_HEADER = "x-body-crc32"
"""HTTP header and gRPC metadata key: CRC-32 of the serialised request, in decimal. TCP's 16-bit sum lets about one
damaged segment in 65,536 through (Stone and Partridge, SIGCOMM 2000), and a flipped bit in a prompt's id would be
scored as it stands."""
REQUEST_ID_HEADER = "x-request-id"
"""The request's id in the server's log: HTTP header or gRPC metadata, taken from the caller and sent back."""

STORE_KEY = "workers"
"""In the store where gloo's ranks meet: how many workers have come. A sender need not wait for those of a server
that refused."""

TENSOR_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""The types of transferred tensors: safetensors' name, and torch's for the same bytes."""

_MAX_VARINT_BYTES = 5


@dataclass(frozen=True)
class Operation:
    """One operation of the service: its gRPC method and its HTTP method and path."""

    grpc_method: str
    http_method: str
    http_path: str


GET_INFO = Operation("GetInfo", "GET", "/v1/info")
SCORE = Operation("Score", "POST", "/v1/score")
GENERATE = Operation("Generate", "POST", "/v1/generate")

WEIGHTS_PATH = "/v1/teachers/{name}/weights"
TEACHER_PATH = "/v1/teachers/{name}"


def update_weights(teacher: str) -> Operation:
    """The update of one teacher's weights."""
    return Operation("UpdateWeights", "PUT", WEIGHTS_PATH.format(name=quote(teacher, safe="")))


def unload_teacher(teacher: str) -> Operation:
    """The end of one teacher's service."""
    return Operation("UnloadTeacher", "DELETE", TEACHER_PATH.format(name=quote(teacher, safe="")))


class Transport(Protocol):
    """Moves serialised messages: one out and a stream back, or a stream out and one back. It knows no message type."""

    @property
    def url(self) -> str:
        """Where it leads; named in errors."""
        ...

    def stream(self, operation: Operation, request: bytes, *, timeout_s: float | None) -> AsyncGenerator[bytes, None]:
        """The serialised replies as they arrive.

        Args:
            timeout_s: told to the server, which frees the work when it has passed.

        Raises:
            TeacherError: the server's own error; NotReady when it cannot be reached or the stream broke off.
        """
        ...

    async def upload(self, operation: Operation, requests: AsyncIterable[bytes], *, timeout_s: float | None) -> bytes:
        """The serialised reply to a stream of requests; arguments and errors as for `stream`.

        The server's error is raised also where it came before the last request was sent; an exception of `requests`
        breaks the call off and is raised as it is.
        """
        ...

    async def aclose(self) -> None:
        """Closes the connections."""
        ...


def body_crc(body: bytes) -> str:
    """The value of BODY_CRC_HEADER for a request's bytes."""
    return str(zlib.crc32(body))


def check_body(body: bytes, crc: str | None) -> None:
    """Raises Corrupted when the sender's BODY_CRC_HEADER is another than the body's; None was not sent."""
    if crc is not None and crc != body_crc(body):
        raise Corrupted(
            f"the request was damaged on its way: CRC-32 {body_crc(body)} over {len(body)} bytes, sent as {crc[:20]}"
        )


def frame(message: bytes) -> bytes:
    """The message behind its length as a varint: protobuf's delimited form."""
    length = len(message)
    prefix = bytearray()
    while length >= 0x80:
        prefix.append(length & 0x7F | 0x80)
        length >>= 7
    prefix.append(length)
    return bytes(prefix) + message


class FrameReader:
    """Cuts a byte stream back into the messages that `frame` wrote."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The messages that `chunk` completes; raises ValueError on a length that cannot be."""
        self._buffer += chunk
        messages = []
        start = 0
        while (head := self._head(start)) is not None:
            body, length = head
            if len(self._buffer) < body + length:
                break
            messages.append(bytes(memoryview(self._buffer)[body : body + length]))
            start = body + length
        del self._buffer[:start]
        return messages

    def finish(self) -> None:
        """Raises ValueError when the stream ended inside a message."""
        if self._buffer:
            raise ValueError(f"the stream ended inside a message, after {len(self._buffer)} bytes of it")

    def _head(self, start: int) -> tuple[int, int] | None:
        """Where the body of the frame at `start` begins and its length; None when more bytes are needed."""
        length = 0
        for i, byte in enumerate(self._buffer[start : start + _MAX_VARINT_BYTES]):
            length |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if length > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a message of {length} bytes; the limit is {MAX_MESSAGE_BYTES}")
                return start + i + 1, length
        if len(self._buffer) - start >= _MAX_VARINT_BYTES:
            raise ValueError("a length prefix of more than 5 bytes")
        return None
