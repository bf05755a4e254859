"""Every error a teacher can answer with, and the one table that maps it to HTTP and gRPC.

TeacherError
├── InvalidRequest      the request is wrong; the message names the field, the value and the fix
├── ContextTooLong      prompt, privileged information and completion do not fit; both numbers are named
├── Unauthenticated     no valid credentials
├── PermissionDenied    valid credentials without the needed scope
├── UnknownTeacher      no teacher of that name here
├── Conflict            the weights version asked for is not the one served
├── Overloaded          the queue is full; retry after `retry_after_s` seconds
├── NotReady            starting, draining or unreachable; retry
├── DeadlineExceeded    the caller's deadline passed; retry with a longer one
├── EngineFailed        the engine failed on a valid request
└── Corrupted           a request or a reply was damaged on its way; retry
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Row:
    """One row of the table: the HTTP status, the gRPC status code's name, and whether a retry can help."""

    http_status: int
    grpc_code: str
    retryable: bool


class TeacherError(Exception):
    """The base of all errors a teacher answers with.

    Args:
        message: one sentence for a person: what is wrong, with the value, and the fix.
        field: the request's field at fault ("items[3].temperature"), or "" when none is.
        retry_after_s: seconds to wait before a retry, or None.
    """

    row: ClassVar[Row] = Row(500, "INTERNAL", retryable=False)

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def name(self) -> str:
        """The error's name on the wire."""
        return type(self).__name__

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidRequest(TeacherError):
    """The request is wrong; nothing of it was scored."""

    row = Row(422, "INVALID_ARGUMENT", retryable=False)


class ContextTooLong(TeacherError):
    """Prompt, privileged information and completion together exceed the context; nothing is ever truncated."""

    row = Row(422, "OUT_OF_RANGE", retryable=False)


class Unauthenticated(TeacherError):
    """No valid credentials."""

    row = Row(401, "UNAUTHENTICATED", retryable=False)


class PermissionDenied(TeacherError):
    """Valid credentials without the needed scope."""

    row = Row(403, "PERMISSION_DENIED", retryable=False)


class UnknownTeacher(TeacherError):
    """No teacher of that name is served here."""

    row = Row(404, "NOT_FOUND", retryable=False)


class Conflict(TeacherError):
    """The weights version asked for is not the one served."""

    row = Row(409, "FAILED_PRECONDITION", retryable=False)


class Overloaded(TeacherError):
    """The queue is full; `retry_after_s` says when to come back."""

    row = Row(429, "RESOURCE_EXHAUSTED", retryable=True)


class NotReady(TeacherError):
    """The teacher is starting, draining or cannot be reached."""

    row = Row(503, "UNAVAILABLE", retryable=True)


class DeadlineExceeded(TeacherError):
    """The caller's deadline passed before the work was done."""

    row = Row(504, "DEADLINE_EXCEEDED", retryable=True)


class EngineFailed(TeacherError):
    """The engine failed on a valid request."""

    row = Row(500, "INTERNAL", retryable=False)


class Corrupted(TeacherError):
    """A request or a reply was damaged on its way; nothing of it is used."""

    row = Row(400, "DATA_LOSS", retryable=True)


ERRORS: dict[str, type[TeacherError]] = {
    error.__name__: error
    for error in (
        InvalidRequest,
        ContextTooLong,
        Unauthenticated,
        PermissionDenied,
        UnknownTeacher,
        Conflict,
        Overloaded,
        NotReady,
        DeadlineExceeded,
        EngineFailed,
        Corrupted,
    )
}
"""The table, by name on the wire."""


def too_large(num_bytes: int | str, max_bytes: int | str) -> InvalidRequest:
    """The refusal of a request by its size; the client, HTTP and gRPC each measure it at another place."""
    return InvalidRequest(f"the request has {num_bytes} bytes; the limit is {max_bytes}; send fewer items")


def error_from_name(name: str, message: str, *, field: str = "", retry_after_s: float | None = None) -> TeacherError:
    """The error of that name; a name this version does not know becomes EngineFailed and keeps its name in the text."""
    if name in ERRORS:
        return ERRORS[name](message, field=field, retry_after_s=retry_after_s)
    return EngineFailed(f"{name}: {message}", field=field, retry_after_s=retry_after_s)
