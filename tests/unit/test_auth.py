"""Tokens and scopes: who is let in, who is not, and that no message ever holds a secret."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import structlog

from protos.errors import InvalidRequest, PermissionDenied, Unauthenticated
from teacher_server.auth import ADMIN, GENERATE, OPEN, SCOPES, SCORE, Access, Caller
from teacher_server.config import StartError
from teacher_server.tokens import load_access, parse_tokens

SECRET, OTHER = "correct-horse-battery-staple", "another-secret-of-28-letters"
FILE = f"""
[trainer]
sha256 = "{hashlib.sha256(SECRET.encode()).hexdigest().upper()}"
scopes = ["score", "generate"]

[prometheus]
token = "{OTHER}"
scopes = []
"""


def access() -> Access:
    return parse_tokens(FILE, "FILE")


def test_a_token_is_known_by_its_digest_or_itself() -> None:
    assert access().caller([f"Bearer {SECRET}"]) == Caller("trainer", frozenset({SCORE, GENERATE}))
    assert access().caller([f"bearer {OTHER}"]) == Caller("prometheus", frozenset())
    assert SECRET not in repr(access())
    assert OTHER not in repr(access())


@pytest.mark.parametrize(
    ("authorization", "words"),
    [
        ([], "this server needs a token"),
        ([SECRET], "not of the form"),
        ([f"Basic {SECRET}"], "not of the form"),
        (["Bearer "], "not of the form"),
        ([f"Bearer {SECRET}", f"Bearer {SECRET}"], "2 authorization headers"),
        ([f"Bearer {SECRET}x"], "not one of this server's"),
        ([f"Bearer  {SECRET}"], "not one of this server's"),
        (["Bearer Grüße"], "not one of this server's"),
    ],
)
def test_what_is_no_valid_token_is_unauthenticated(authorization: list[str], words: str) -> None:
    with pytest.raises(Unauthenticated, match=words) as caught:
        access().caller(authorization)
    assert SECRET not in str(caught.value)


def test_a_scope_that_is_missing_is_named_with_those_there_are() -> None:
    caller = Caller("trainer", frozenset({SCORE}))
    caller.require(SCORE)
    with pytest.raises(PermissionDenied, match=r"token 'trainer' lacks the scope generate \(it has: score\)"):
        caller.require(GENERATE)


def test_without_tokens_all_but_admin_is_open() -> None:
    caller = OPEN.caller([])
    caller.require(SCORE)
    caller.require(GENERATE)
    with pytest.raises(PermissionDenied, match="admin is off, because this server has no tokens"):
        caller.require(ADMIN)
    assert OPEN.caller(["Bearer whatever"]) == caller


def test_a_client_is_its_token_or_what_it_says_or_where_it_is() -> None:
    assert Caller("trainer", frozenset()).client("me", "10.0.0.1") == "trainer"
    assert Caller("", frozenset()).client("me", "10.0.0.1") == "me"
    assert Caller("", frozenset()).client("", "10.0.0.1") == "10.0.0.1"
    with pytest.raises(InvalidRequest, match="x-client-id has 129 characters; send at most 128"):
        Caller("", frozenset()).client("m" * 129, "10.0.0.1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no tokens"),
        ("[a", "is not TOML"),
        (f'a = "{SECRET}"', "a: Input should be"),
        (f'[a]\ntoken = "{SECRET}"', "a.scopes: Field required"),
        (f'[a]\ntoken = "{SECRET}"\nscopes = ["sorce"]', "a.scopes.0: Input should be 'score', 'generate' or 'admin'"),
        (f'[a]\ntokn = "{SECRET}"\nscopes = []', "a.tokn: Extra inputs"),
        (f'[a]\nsha256 = "{SECRET}"\nscopes = []', "a.sha256: String should match"),
        (f'[a]\ntoken = "{SECRET} "\nscopes = []', "a.token: String should match"),
        (f'[a]\ntoken = "{SECRET[:15]}"\nscopes = []', "a.token: String should have at least 16"),
        ("[a]\nscopes = []", "a: give either token or sha256"),
        (f'[a]\ntoken = "{SECRET}"\nsha256 = "{"0" * 64}"\nscopes = []', "a: give either"),
        (f'[""]\ntoken = "{SECRET}"\nscopes = []', "at least 1"),
        (f'[a]\ntoken = "{SECRET}"\nscopes = []\n[b]\ntoken = "{SECRET}"\nscopes = []', "a and b are the same token"),
    ],
)
def test_a_wrong_file_is_one_sentence_without_a_secret(text: str, words: str) -> None:
    with pytest.raises(StartError) as caught:
        parse_tokens(text, "FILE")
    message = str(caught.value)
    assert message.startswith("FILE")
    assert words in message
    assert "\n" not in message
    assert SECRET[:15] not in message


def test_a_file_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(FILE)
    for mode, num_warnings in ((0o600, 0), (0o644, 1)):
        path.chmod(mode)
        with structlog.testing.capture_logs() as lines:
            assert load_access(path, None) == access()
        assert len(lines) == num_warnings
    assert lines[0]["path"] == str(path)


def test_tokens_come_from_one_place(tmp_path: Path) -> None:
    assert load_access(None, None) == OPEN
    assert load_access(None, FILE) == access()
    with pytest.raises(StartError, match="--tokens and TEACHER_TOKENS are both given"):
        load_access(tmp_path / "tokens.toml", FILE)
    with pytest.raises(StartError, match=r"--tokens .*absent.toml: No such file"):
        load_access(tmp_path / "absent.toml", None)


def test_the_scopes_are_those_that_a_file_may_name() -> None:
    text = f'[a]\ntoken = "{SECRET}"\nscopes = ["score", "generate", "admin"]'
    [token] = parse_tokens(text, "FILE").tokens
    assert token.scopes == frozenset(SCOPES)
