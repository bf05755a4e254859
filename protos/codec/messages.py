"""Serialised bytes <-> protobuf messages of any type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.errors import InvalidRequest

_Message = TypeVar("_Message", bound=Message)


def parse(message_type: type[_Message], data: bytes) -> _Message:
    """The message in `data`; InvalidRequest where it is none."""
    message = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = message_type.DESCRIPTOR.name
        raise InvalidRequest(f"the {len(data)} bytes are not a protobuf {name}; see teacher.proto") from error
    return message


def plain_fields(message: Message) -> dict[str, Any]:
    """The message's fields by name, a repeated one as a tuple."""
    return {
        field.name: tuple(getattr(message, field.name)) if field.is_repeated else getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
    }


def build(message_type: Callable[..., _Message], where: str, fields: dict[str, Any]) -> _Message:
    """The message; a number that its wire type cannot hold is an InvalidRequest."""
    try:
        return message_type(**fields)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"a value does not fit the contract: {error}", field=where) from error
