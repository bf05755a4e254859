"""The body of an HTTP request: of which type, how large, how slow and whether whole; what it says is the codec's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from protos.errors import DeadlineExceeded, InvalidRequest, too_large
from protos.wire import BODY_CRC_HEADER, JSON_TYPE, PROTOBUF_TYPE, FrameReader, check_body
from teacher_server.limits import Limits

_Record = TypeVar("_Record")


async def read_record(
    request: Request,
    limits: Limits,
    *,
    from_json: Callable[[bytes], _Record],
    from_protobuf: Callable[[bytes], _Record],
) -> _Record:
    """The request's record; InvalidRequest on another content type, too many bytes or a body that is no request."""
    read = from_json if content_type(request) == JSON_TYPE else from_protobuf
    return read(await read_body(request, limits))


def content_type(request: Request) -> str:
    """One of the two types that bodies may have."""
    named = request.headers.get("content-type", "").partition(";")[0].strip()
    if named not in (PROTOBUF_TYPE, JSON_TYPE):
        raise InvalidRequest(
            f"content-type is {named[:80]!r}; send {PROTOBUF_TYPE} or {JSON_TYPE}", field="content-type"
        )
    return named


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body.

    Raises:
        InvalidRequest: it is too large, or breaks off.
        Corrupted: it is not the one that was sent.
        DeadlineExceeded: it comes too slowly.
    """
    max_body_bytes = limits.max_message_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_body_bytes:
        raise too_large(declared, max_body_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_body_bytes:
                    raise too_large(f"more than {max_body_bytes}", max_body_bytes)
    except TimeoutError:
        raise DeadlineExceeded(
            f"{len(body)} bytes of the body came within {limits.body_timeout_s:g} s and more is to come; send it faster"
        ) from None
    except ClientDisconnect as error:
        raise InvalidRequest(f"the body broke off after {len(body)} bytes") from error
    data = bytes(body)
    check_body(data, request.headers.get(BODY_CRC_HEADER))
    return data


async def messages(request: Request) -> AsyncGenerator[bytes, None]:
    """The messages of a body in which each stands behind its length; InvalidRequest where one is broken or cut off."""
    reader = FrameReader()
    try:
        async for piece in request.stream():
            for message in reader.feed(piece):
                yield message
        reader.finish()
    except ValueError as error:
        raise InvalidRequest(f"the body is not a stream of messages: {error}") from error
    except ClientDisconnect as error:
        raise InvalidRequest("the upload broke off") from error
