"""What `connect` takes as a token, and when it warns."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from protos.client import connect
from protos.credentials import Credentials, Tls, credentials, is_loopback
from protos.errors import InvalidRequest

SECRET = "correct-horse-battery-staple"


@pytest.mark.parametrize("token", [f"{SECRET}\n", f"{SECRET} x", "Grüße", f"{SECRET}\r\nx-other: y"])
@pytest.mark.parametrize("url", ["grpc://127.0.0.1:1", "http://127.0.0.1:1"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(url: str, token: str) -> None:
    with pytest.raises(InvalidRequest, match="characters that no bearer token has") as caught:
        connect(url, token=token)
    assert token not in str(caught.value)
    assert SECRET not in repr(Credentials(SECRET))


def test_tls_for_plaintext_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"tls is given and http://a:1 is plaintext; use grpcs:// or https://"):
        connect("http://a:1", tls=Tls(ca="ca.pem"))


def test_a_token_in_plaintext_over_a_network_is_warned_of() -> None:
    with pytest.warns(
        UserWarning, match=r"token for http://teacher\.example:1 crosses the network in plaintext"
    ) as caught:
        connect("http://teacher.example:1", token=SECRET)
    assert caught[0].filename == __file__
    assert SECRET not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        connect("http://localhost:1", token=SECRET)
        connect("grpc://[::1]:1", token=SECRET)
        connect("https://teacher.example:1", token=SECRET)
        connect("http://teacher.example:1", token="")


def test_a_token_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    monkeypatch.delenv("TEACHER_TOKEN", raising=False)
    monkeypatch.setenv("TEACHER_TOKEN_FILE", str(file))
    assert credentials("https://a:1", "a", secure=True, token=None, tls=None).token == SECRET
    # What the caller says goes before what the environment says.
    assert credentials("https://a:1", "a", secure=True, token="", tls=None).token == ""
    monkeypatch.setenv("TEACHER_TOKEN", SECRET)
    with pytest.raises(InvalidRequest, match="TEACHER_TOKEN and TEACHER_TOKEN_FILE are both set; unset one"):
        connect("https://a:1")


def test_a_token_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TEACHER_TOKEN", raising=False)
    monkeypatch.setenv("TEACHER_TOKEN_FILE", str(tmp_path / "absent"))
    with pytest.raises(InvalidRequest, match=r"TEACHER_TOKEN_FILE is .*/absent: No such file or directory"):
        connect("https://a:1")
    (tmp_path / "absent").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"TEACHER_TOKEN_FILE is .*/absent: it is not UTF-8 text"):
        connect("https://a:1")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("teacher", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected
