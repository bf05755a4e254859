"""A teacher by URL: `connect` picks the transport, and every reply is checked before it is handed on.

    async with connect("grpc://localhost:8001") as teacher:
        info = await teacher.info()
        results = await teacher.score([ScoreItem(prompt=ids, completion_ids=completion, top_k=20)], timeout_s=60)

A synchronous caller keeps one event loop for the life of its teacher (`asyncio.Runner`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Protocol, Self, TypeVar
from urllib.parse import urlsplit

from protos import codec, verify
from protos.credentials import Credentials, Tls, credentials
from protos.errors import Corrupted, DeadlineExceeded, InvalidRequest, too_large
from protos.records import (
    GenerateItem,
    GenerateRequest,
    GenerateResult,
    ScoreItem,
    ScoreRequest,
    ScoreResult,
    ServedTeacher,
    TeacherInfo,
    WeightsUpdate,
)
from protos.service import GenerateStream, ScoreStream, TeacherAdmin, TeacherService
from protos.wire import (
    GENERATE,
    GET_INFO,
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    SCORE,
    Operation,
    Transport,
    unload_teacher,
    update_weights,
)

OPENAI_SCHEMES = ("openai+http", "openai+https")
SCHEMES = ("grpc", "grpcs", "http", "https", *OPENAI_SCHEMES)
SECURE_SCHEMES = ("grpcs", "https", "openai+https")
URL_FORMS = (
    "grpc://host:port, grpcs://host:port, http://host:port, https://host:port, "
    "openai+http://host:port or openai+https://host:port"
)
POOL_FORMS = "several of those with commas between them, or dns+grpc://name:port or dns+http://name:port"

_T = TypeVar("_T")


class Teacher(TeacherService, TeacherAdmin, Protocol):
    """A teacher somewhere else; an async context manager that closes it.

    Who implements it by name (`class RemoteTeacher(Teacher)`) inherits `score`, `generate` and the context manager.
    """

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    async def score(
        self, request: ScoreRequest | Sequence[ScoreItem], *, timeout_s: float | None = None
    ) -> list[ScoreResult]:
        """One result for each item, in order; raises the first error of any item."""
        request = request if isinstance(request, ScoreRequest) else ScoreRequest(tuple(request))
        return await verify.in_order(self.score_stream(request, timeout_s=timeout_s), len(request.items))

    async def generate(
        self, request: GenerateRequest | Sequence[GenerateItem], *, timeout_s: float | None = None
    ) -> list[GenerateResult]:
        """One result for each item, in order; raises the first error of any item."""
        request = request if isinstance(request, GenerateRequest) else GenerateRequest(tuple(request))
        return await verify.in_order(self.generate_stream(request, timeout_s=timeout_s), len(request.items))

    async def aclose(self) -> None:
        """Closes the connections."""
        ...

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


def is_pool(url: str) -> bool:
    """Whether the URL is one of `POOL_FORMS`."""
    return "," in url or url.startswith("dns+")


def connect(url: str, *, token: str | None = None, tls: Tls | None = None) -> Teacher:
    """The teacher at `url`, or the pool of replicas that it names; nothing is sent before the first call.

    Args:
        token: the bearer token; None takes it from TEACHER_TOKEN or TEACHER_TOKEN_FILE, "" sends none.
        tls: the files for grpcs and https; None trusts the authority in TEACHER_CA, or else the system's.

    Raises:
        InvalidRequest: the URL is not one of `URL_FORMS` or `POOL_FORMS`, or the token or a file of `tls` cannot be
            used.
    """
    if is_pool(url):
        from protos.pool import TeacherPool

        return TeacherPool(url, partial(connect, token=token, tls=tls))
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in SCHEMES and parts.hostname and parts.port and "@" not in parts.netloc
    except ValueError as error:
        raise InvalidRequest(f"{url!r} is not a teacher's URL ({error}); it must be {URL_FORMS}") from error
    if not well_formed or parts.path.strip("/") or parts.query or parts.fragment:
        raise InvalidRequest(f"{url!r} is not a teacher's URL; it must be {URL_FORMS}")
    secure = parts.scheme in SECURE_SCHEMES
    own = credentials(url, parts.hostname or "", secure=secure, token=token, tls=tls)
    if parts.scheme in OPENAI_SCHEMES:
        from protos._openai import OpenAITeacher

        return OpenAITeacher(url, own)
    return RemoteTeacher(_transport(url, parts.scheme, parts.netloc, own))


def _transport(url: str, scheme: str, target: str, own: Credentials) -> Transport:
    if scheme in ("grpc", "grpcs"):
        from protos._grpc import GrpcTransport

        return GrpcTransport(url, target, own)
    from protos._http import HttpTransport

    return HttpTransport(url, own)


class RemoteTeacher(Teacher):
    """A teacher behind a transport; see `Teacher`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    @property
    def url(self) -> str:
        """Where it is."""
        return self._transport.url

    async def info(self) -> TeacherInfo:
        """See TeacherService."""
        async with aclosing(self._replies(GET_INFO, b"", codec.decode_info, None)) as replies:
            async for info in replies:
                return info
        raise Corrupted(f"{self.url} sent no reply to GetInfo")

    async def score_stream(self, request: ScoreRequest, *, timeout_s: float | None = None) -> ScoreStream:
        """See TeacherService; every result is checked against its item (protos.verify)."""
        replies = self._replies(SCORE, codec.encode_score_request(request), codec.decode_score_reply, timeout_s)
        async with aclosing(verify.each_once(replies, request.items, verify.check_score)) as checked:
            async for reply in checked:
                yield reply

    async def generate_stream(self, request: GenerateRequest, *, timeout_s: float | None = None) -> GenerateStream:
        """See TeacherService; every result is checked against its item (protos.verify)."""
        body = codec.encode_generate_request(request)
        replies = self._replies(GENERATE, body, codec.decode_generate_reply, timeout_s)
        async with aclosing(verify.each_once(replies, request.items, verify.check_generation)) as checked:
            async for reply in checked:
                yield reply

    async def update_weights(
        self, update: WeightsUpdate, chunks: AsyncIterable[bytes] | None = None, *, timeout_s: float | None = None
    ) -> ServedTeacher:
        """See TeacherAdmin; `chunks` of any size, for example `read_chunks(path)`, are taken as the server is ready."""
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._transport.upload(
                    update_weights(update.teacher), _weights_messages(update, chunks), timeout_s=timeout_s
                )
        except TimeoutError:
            raise DeadlineExceeded(f"{self.url} did not finish within {timeout_s:g} s") from None
        return self._decoded(codec.decode_updated, reply)

    async def unload(self, teacher: str, *, timeout_s: float | None = None) -> ServedTeacher:
        """See TeacherAdmin."""
        replies = self._replies(unload_teacher(teacher), codec.encode_unload(teacher), codec.decode_unloaded, timeout_s)
        async with aclosing(replies):
            async for unloaded in replies:
                return unloaded
        raise Corrupted(f"{self.url} sent no reply to UnloadTeacher")

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._transport.aclose()

    async def _replies(
        self, operation: Operation, body: bytes, decode: Callable[[bytes], _T], timeout_s: float | None
    ) -> AsyncGenerator[_T, None]:
        if len(body) > MAX_MESSAGE_BYTES:
            raise too_large(len(body), MAX_MESSAGE_BYTES)
        stream = self._transport.stream(operation, body, timeout_s=timeout_s)
        async with aclosing(_until(stream, timeout_s, self.url)) as messages:
            async for message in messages:
                yield self._decoded(decode, message)

    def _decoded(self, decode: Callable[[bytes], _T], message: bytes) -> _T:
        try:
            return decode(message)
        except InvalidRequest as error:
            raise Corrupted(f"{self.url} sent a reply that cannot be read: {error}") from error


async def read_chunks(path: Path) -> AsyncGenerator[bytes, None]:
    """The file's bytes in order, for `update_weights`."""
    with path.open("rb") as file:
        while chunk := await asyncio.to_thread(file.read, MAX_CHUNK_BYTES):
            yield chunk


async def _weights_messages(update: WeightsUpdate, chunks: AsyncIterable[bytes] | None) -> AsyncGenerator[bytes, None]:
    """The header, then every chunk in messages of at most MAX_CHUNK_BYTES."""
    yield codec.encode_weights_update(update)
    if chunks is None:
        return
    async for chunk in chunks:
        for start in range(0, len(chunk), MAX_CHUNK_BYTES):
            yield codec.encode_weights_chunk(chunk[start : start + MAX_CHUNK_BYTES])


async def _until(stream: AsyncGenerator[bytes, None], timeout_s: float | None, url: str) -> AsyncGenerator[bytes, None]:
    """The stream's messages; DeadlineExceeded when it has not ended `timeout_s` seconds from now."""
    loop = asyncio.get_running_loop()
    deadline = None if timeout_s is None else loop.time() + timeout_s
    async with aclosing(stream):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await anext(stream)
            except TimeoutError:
                raise DeadlineExceeded(f"{url} did not finish within {timeout_s:g} s") from None
            except StopAsyncIteration:
                return
            yield message
