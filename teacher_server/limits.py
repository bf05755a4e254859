"""How much of a connection one client may use."""

from __future__ import annotations

from dataclasses import dataclass

from protos.wire import MAX_MESSAGE_BYTES


@dataclass(frozen=True)
class Limits:
    """Limits of both listeners; those of a request's content are in GetInfo.

    Attributes:
        max_message_bytes: of one request; an InvalidRequest with both numbers beyond.
        max_head_bytes: of an HTTP request's line and headers together, as of gRPC's metadata.
        head_timeout_s: seconds that an HTTP connection may go without a whole request head, idle ones too. Above the
            5 s after which httpx drops an idle connection: else a client would meet connections that have just closed.
        body_timeout_s: seconds for a whole HTTP body: 256 MiB at 1 MB/s.
    """

    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_head_bytes: int = 64 * 1024
    head_timeout_s: float = 30.0
    body_timeout_s: float = 300.0


DEFAULT_LIMITS = Limits()
