"""What `connect` takes and what it refuses, in one sentence each."""

from __future__ import annotations

import pytest

from protos._grpc import GrpcTransport
from protos._http import HttpTransport
from protos._openai import OpenAITeacher
from protos.client import RemoteTeacher, connect
from protos.errors import InvalidRequest
from protos.wire import Transport


@pytest.mark.parametrize(
    ("url", "transport"),
    [
        ("grpc://localhost:8001", GrpcTransport),
        ("grpcs://teacher.example:443", GrpcTransport),
        ("http://127.0.0.1:8000", HttpTransport),
        ("https://teacher.example:8443/", HttpTransport),
        ("http://[::1]:8000", HttpTransport),
    ],
)
def test_the_scheme_picks_the_transport(url: str, transport: type[Transport]) -> None:
    teacher = connect(url)
    assert isinstance(teacher, RemoteTeacher)
    assert isinstance(teacher._transport, transport)
    assert teacher.url == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8001",
        "grpc://localhost",
        "grpc://:8001",
        "ftp://localhost:8001",
        "http://localhost:99999",
        "http://localhost:x",
        "http://localhost:8000/v1",
        "http://localhost:8000?a=b",
        "http://user:secret@localhost:8000",
        "http://[::1:8000",
        "openai+grpc://localhost:8001",
        "openai+http://localhost:8000/v1",
    ],
)
def test_a_malformed_url_is_refused_with_the_right_form(url: str) -> None:
    with pytest.raises(InvalidRequest, match="grpc://host:port") as caught:
        connect(url)
    assert repr(url) in caught.value.message


@pytest.mark.parametrize("url", ["openai+http://localhost:8000", "openai+https://teacher.example:443"])
def test_a_stock_server_has_schemes_of_its_own(url: str) -> None:
    teacher = connect(url)
    assert isinstance(teacher, OpenAITeacher)
    assert teacher.url == url
