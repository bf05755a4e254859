"""Errors of the table <-> protobuf."""

from __future__ import annotations

from protos.codec.messages import parse
from protos.errors import Corrupted, InvalidRequest, TeacherError, error_from_name
from protos.teacher.v1 import teacher_pb2 as pb

MAX_ERROR_CHARS = 500
"""Of an error's message and field: gRPC carries them in trailing metadata, which clients limit to a few KiB."""


def encode_error(error: TeacherError) -> bytes:
    """The error as a serialised Error."""
    return error_message(error).SerializeToString()


def decode_error(data: bytes) -> TeacherError:
    """The error in a serialised Error, ready to be raised."""
    return error_of(parse(pb.Error, data))


def decode_error_reply(data: bytes, url: str) -> TeacherError:
    """The error that the server at `url` answered with; Corrupted where its bytes are none."""
    try:
        return decode_error(data)
    except InvalidRequest as error:
        return Corrupted(f"{url} sent an error that cannot be read: {error}")


def error_message(error: TeacherError) -> pb.Error:
    """The error as an Error, its texts cut at MAX_ERROR_CHARS."""
    return pb.Error(
        name=error.name,
        message=error.message[:MAX_ERROR_CHARS],
        field=error.field[:MAX_ERROR_CHARS],
        retry_after_s=error.retry_after_s or 0.0,
    )


def error_of(message: pb.Error) -> TeacherError:
    """The error in an Error."""
    return error_from_name(
        message.name, message.message, field=message.field, retry_after_s=message.retry_after_s or None
    )
