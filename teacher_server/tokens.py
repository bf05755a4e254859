"""The operator's tokens: from a TOML file or the environment to an Access.

    [trainer]
    sha256 = "…"                     # printf %s "$TOKEN" | sha256sum
    scopes = ["score", "generate"]

    [prometheus]
    token = "…"                      # or the secret itself, in a file that others cannot read
    scopes = []                      # may read info, /metrics and /docs

No message of this module holds a secret.
"""

from __future__ import annotations

import stat
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from protos.credentials import TOKEN_PATTERN
from teacher_server.auth import Access, Token, sha256_of
from teacher_server.config import StartError

TOKENS_VARIABLE = "TEACHER_TOKENS"
"""The environment variable that holds the text of a tokens file."""

MIN_TOKEN_CHARS = 16
"""What no one guesses; `openssl rand -hex 32` makes 64."""

_log = structlog.get_logger()


class _Entry(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(extra="forbid")

    token: Annotated[str, Field(min_length=MIN_TOKEN_CHARS, pattern=TOKEN_PATTERN)] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    scopes: tuple[Literal["score", "generate", "admin"], ...]

    @model_validator(mode="after")
    def _one_secret(self) -> Self:
        if (self.token is None) == (self.sha256 is None):
            raise ValueError("give either token or sha256")
        return self

    def digest(self) -> bytes:
        """The SHA-256 digest of the secret."""
        return bytes.fromhex(self.sha256) if self.sha256 is not None else sha256_of(self.token or "")


_TABLES = TypeAdapter(dict[Annotated[str, Field(min_length=1)], _Entry])


def load_access(path: Path | None, environment: str | None) -> Access:
    """The tokens in the file at `path` or in the text of TEACHER_TOKENS; none where both are None.

    Raises:
        StartError: both are given, or one cannot be read, is not such a file, or holds a token twice.
    """
    if path is not None and environment is not None:
        raise StartError(f"--tokens and {TOKENS_VARIABLE} are both given; use one of them")
    if path is not None:
        return parse_tokens(_read(path), f"--tokens {path}")
    if environment is not None:
        return parse_tokens(environment, TOKENS_VARIABLE)
    return Access()


def parse_tokens(text: str, source: str) -> Access:
    """The tokens in a TOML text; StartError names `source` and the table at fault."""
    try:
        entries = _TABLES.validate_python(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise StartError(f"{source} is not TOML: {error}") from None
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise StartError(f"{source}: {key}: {fault['msg'].removeprefix('Value error, ')}") from None
    if not entries:
        raise StartError(f"{source} has no tokens; add a table with sha256 and scopes for each")
    tokens = tuple(Token(name, entry.digest(), frozenset(entry.scopes)) for name, entry in entries.items())
    name_of: dict[bytes, str] = {}
    for token in tokens:
        if token.sha256 in name_of:
            raise StartError(
                f"{source}: {name_of[token.sha256]} and {token.name} are the same token; give each its own"
            )
        name_of[token.sha256] = token.name
    return Access(tokens)


def _read(path: Path) -> str:
    try:
        if path.stat().st_mode & stat.S_IROTH:
            _log.warning("every user of this machine can read the tokens file; chmod it to 600", path=str(path))
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise StartError(f"--tokens {path}: {reason}") from None
