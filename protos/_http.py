"""The HTTP transport; with _grpc, the only place that imports a network library."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Mapping

import httpx

from protos import codec
from protos.credentials import Credentials
from protos.errors import ERRORS, Corrupted, EngineFailed, InvalidRequest, NotReady, TeacherError
from protos.wire import BODY_CRC_HEADER, PROTOBUF_TYPE, TIMEOUT_HEADER, FrameReader, Operation, body_crc, frame

CONNECT_TIMEOUT_S = 10.0
"""A server that takes no connection by then cannot be reached; the caller's deadline covers all else."""

_GATEWAY_STATUSES = (502, 503, 504)
"""What a proxy answers when the server behind it is away."""

_ERROR_OF_STATUS: dict[int, type[TeacherError]] = {error.row.http_status: error for error in reversed(ERRORS.values())}
_BODY_CHARS = 200


class HttpTransport:
    """One connection pool to `url` ("http://host:port"); see protos.wire.Transport."""

    def __init__(self, url: str, own: Credentials) -> None:
        self.url = url
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(
            base_url=url, timeout=timeout, limits=limits, headers=own.headers(), verify=own.verify()
        )

    async def stream(
        self, operation: Operation, request: bytes, *, timeout_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        """See protos.wire.Transport."""
        headers = _headers(timeout_s) | {BODY_CRC_HEADER: body_crc(request)}
        reader = FrameReader()
        try:
            async with self._client.stream(
                operation.http_method, operation.http_path, content=request, headers=headers
            ) as response:
                if response.status_code != httpx.codes.OK:
                    raise await self._teacher_error(response)
                async for chunk in response.aiter_bytes():
                    for message in reader.feed(chunk):
                        yield message
            reader.finish()
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise NotReady(f"{self.url} cannot be reached or broke off: {reason}") from error
        except ValueError as error:
            raise Corrupted(f"{self.url} sent a broken stream: {error}") from error

    async def upload(self, operation: Operation, requests: AsyncIterable[bytes], *, timeout_s: float | None) -> bytes:
        """See protos.wire.Transport."""

        async def body() -> AsyncGenerator[bytes, None]:
            async for request in requests:
                yield frame(request)

        try:
            response = await self._client.request(
                operation.http_method, operation.http_path, content=body(), headers=_headers(timeout_s)
            )
            if response.status_code != httpx.codes.OK:
                raise await self._teacher_error(response)
            [reply] = FrameReader().feed(response.content)
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise NotReady(f"{self.url} cannot be reached or broke off: {reason}") from error
        except ValueError as error:
            raise Corrupted(f"{self.url} sent a broken reply: {error}") from error
        return reply

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def _teacher_error(self, response: httpx.Response) -> TeacherError:
        """The server's own error, or what the status says where something else answered."""
        body = await response.aread()
        if response.headers.get("content-type") == PROTOBUF_TYPE:
            return codec.decode_error_reply(body, self.url)
        return error_of_status(self.url, response.status_code, body.decode(errors="replace"), response.headers)


def error_of_status(url: str, status: int, body: str, headers: Mapping[str, str]) -> TeacherError:
    """What a status says where something else than a teacher-server answered."""
    text = f"{url} answered {status}: {body[:_BODY_CHARS]}"
    error = _ERROR_OF_STATUS.get(status, InvalidRequest if status < 500 else EngineFailed)
    if status in _GATEWAY_STATUSES:
        error = NotReady
    seconds = headers.get("retry-after", "")
    return error(text, retry_after_s=float(seconds) if seconds.isdigit() else None)


def _headers(timeout_s: float | None) -> dict[str, str]:
    headers = {"content-type": PROTOBUF_TYPE, "accept": PROTOBUF_TYPE}
    if timeout_s is not None:
        headers[TIMEOUT_HEADER] = repr(timeout_s)
    return headers
