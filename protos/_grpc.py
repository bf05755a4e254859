"""The gRPC transport; with _http, the only place that imports a network library."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable
from pathlib import Path

import grpc
import grpc.aio

from protos import codec
from protos.credentials import Credentials, Tls
from protos.errors import ERRORS, Corrupted, EngineFailed, NotReady, TeacherError, too_large
from protos.wire import BODY_CRC_HEADER, ERROR_METADATA_KEY, GRPC_LIMITS, GRPC_SERVICE, Operation, body_crc

_CHANNEL_OPTIONS = (
    *GRPC_LIMITS,
    # By default a channel waits up to two minutes before it looks again for a server that restarts.
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_BROKEN_CODES = ("INTERNAL", "UNKNOWN", "DATA_LOSS")
"""What gRPC itself says of bytes that are no HTTP/2 or no message; a server of ours sends its error beside the code."""

_TOO_LARGE = re.compile(r"message larger than max \((\d+) vs\. (\d+)\)")
"""How gRPC's core words a message above the receiver's limit; no code of the server's runs before it."""

_ERROR_OF_CODE: dict[str, type[TeacherError]] = {error.row.grpc_code: error for error in ERRORS.values()}


class GrpcTransport:
    """One channel to `target` ("host:port"), opened by the first call; see protos.wire.Transport."""

    def __init__(self, url: str, target: str, own: Credentials) -> None:
        self.url = url
        self._target = target
        self._metadata = tuple(own.headers().items())
        self._credentials = None if own.tls is None else _channel_credentials(own.tls)
        self._channel: grpc.aio.Channel | None = None

    async def stream(
        self, operation: Operation, request: bytes, *, timeout_s: float | None
    ) -> AsyncGenerator[bytes, None]:
        """See protos.wire.Transport."""
        path = f"/{GRPC_SERVICE}/{operation.grpc_method}"
        metadata = (*self._metadata, (BODY_CRC_HEADER, body_crc(request)))
        call = self._open().unary_stream(path)(request, timeout=timeout_s, metadata=metadata)
        try:
            async for reply in call:
                yield reply
        except grpc.aio.AioRpcError as error:
            raise self._teacher_error(error) from error
        finally:
            call.cancel()

    async def upload(self, operation: Operation, requests: AsyncIterable[bytes], *, timeout_s: float | None) -> bytes:
        """See protos.wire.Transport."""
        call = self._open().stream_unary(f"/{GRPC_SERVICE}/{operation.grpc_method}")(
            timeout=timeout_s, metadata=self._metadata
        )
        try:
            async for request in requests:
                if call.done():  # the server's answer came first
                    break
                await call.write(request)
            await call.done_writing()
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._teacher_error(error) from error
        finally:
            call.cancel()

    async def aclose(self) -> None:
        """Closes the channel."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = (
                grpc.aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS)
                if self._credentials is None
                else grpc.aio.secure_channel(self._target, self._credentials, options=_CHANNEL_OPTIONS)
            )
        return self._channel

    def _teacher_error(self, error: grpc.aio.AioRpcError) -> TeacherError:
        """The server's own error, or what gRPC's status says where the server had no say."""
        for key, value in error.trailing_metadata() or ():
            if key == ERROR_METADATA_KEY and isinstance(value, bytes):
                return codec.decode_error_reply(value, self.url)
        code, details = error.code().name, error.details() or ""
        if code == "UNAVAILABLE":
            return NotReady(f"{self.url} cannot be reached or broke off: {details}")
        if code == "RESOURCE_EXHAUSTED" and (sizes := _TOO_LARGE.search(details)):
            return too_large(*sizes.groups())
        if code in _BROKEN_CODES:
            return Corrupted(f"{self.url} sent a broken stream: {code}: {details}")
        return _ERROR_OF_CODE.get(code, EngineFailed)(f"{self.url} answered {code}: {details}")


def _channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    tls.context()  # names a file that cannot be used; gRPC would only find out at the first handshake
    ca, cert, key = (None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.cert, tls.key))
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)
