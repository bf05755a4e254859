"""Who calls and what it may: bearer tokens with scopes. Pure; it knows neither HTTP nor gRPC, and keeps only digests.

    access = Access((Token("trainer", sha256_of(secret), frozenset({SCORE})),))
    caller = access.caller([f"Bearer {secret}"])       # Unauthenticated where the token is not one of them
    caller.require(GENERATE)                           # PermissionDenied: "token 'trainer' lacks the scope generate"

The header is that of RFC 6750, which also says what characters a token may have.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from protos.errors import InvalidRequest, PermissionDenied, Unauthenticated
from protos.wire import AUTHORIZATION, CLIENT_HEADER

SCORE, GENERATE, ADMIN = SCOPES = ("score", "generate", "admin")
OPEN_SCOPES = frozenset((SCORE, GENERATE))
"""What everyone may while no token is configured; admin is off."""

MAX_CLIENT_ID_CHARS = 128
"""A name for people, kept while its work waits."""


@dataclass(frozen=True)
class Caller:
    """Who asks; `name` is its token's, or "" where no token is configured."""

    name: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """Raises PermissionDenied without this scope."""
        if scope in self.scopes:
            return
        if not self.name:
            raise PermissionDenied(f"{scope} is off, because this server has no tokens; start it with --tokens FILE")
        raise PermissionDenied(
            f"token {self.name!r} lacks the scope {scope} (it has: {', '.join(sorted(self.scopes)) or 'none'}); "
            "use another token, or add the scope on the server"
        )

    def client(self, client_id: str, address: str) -> str:
        """Under which name the queue is shared out: the token's, else what the caller calls itself, else its address.

        Raises:
            InvalidRequest: `client_id` is too long.
        """
        if len(client_id) > MAX_CLIENT_ID_CHARS:
            raise InvalidRequest(
                f"{CLIENT_HEADER} has {len(client_id)} characters; send at most {MAX_CLIENT_ID_CHARS}",
                field=CLIENT_HEADER,
            )
        return self.name or client_id or address


@dataclass(frozen=True)
class Token:
    """One configured token: its name, the SHA-256 digest of its secret, and what its holder may."""

    name: str
    sha256: bytes
    scopes: frozenset[str]


@dataclass(frozen=True)
class Access:
    """The configured tokens; with none, score and generate are open to everyone."""

    tokens: tuple[Token, ...] = ()

    def caller(self, authorization: Sequence[str]) -> Caller:
        """Who sent these values of the authorization header; everyone where no token is configured.

        Raises:
            Unauthenticated: no token, or not one of the configured ones.
        """
        if not self.tokens:
            return Caller("", OPEN_SCOPES)
        token = self._matching(sha256_of(_bearer(authorization)))
        if token is None:
            raise Unauthenticated("the token is not one of this server's; ask whoever runs it", field=AUTHORIZATION)
        return Caller(token.name, token.scopes)

    def _matching(self, sha256: bytes) -> Token | None:
        """In constant time: every digest is compared, each in full, so that the time tells nothing of a secret."""
        found = None
        for token in self.tokens:
            if hmac.compare_digest(token.sha256, sha256):
                found = token
        return found


OPEN = Access()
"""A server without tokens."""


def sha256_of(secret: str) -> bytes:
    """The digest that stands for a secret."""
    return hashlib.sha256(secret.encode()).digest()


def _bearer(authorization: Sequence[str]) -> str:
    if not authorization:
        raise Unauthenticated(
            "this server needs a token: send `authorization: Bearer TOKEN`; student-trainer and protos.client "
            "take it from the environment variable TEACHER_TOKEN",
            field=AUTHORIZATION,
        )
    if len(authorization) > 1:
        raise Unauthenticated(f"{len(authorization)} authorization headers; send one", field=AUTHORIZATION)
    scheme, _, secret = authorization[0].partition(" ")
    if scheme.lower() != "bearer" or not secret:
        raise Unauthenticated("the header is not of the form `authorization: Bearer TOKEN`", field=AUTHORIZATION)
    return secret
