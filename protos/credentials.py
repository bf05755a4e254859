"""What a client proves and whom it trusts: a bearer token, a certificate authority and a certificate of its own."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from protos.errors import InvalidRequest
from protos.wire import AUTHORIZATION

TOKEN_VARIABLE = "TEACHER_TOKEN"
TOKEN_FILE_VARIABLE = "TEACHER_TOKEN_FILE"
CA_VARIABLE = "TEACHER_CA"
"""Environment variables that `connect` reads where it is not told: the token itself, a file that holds it (a mounted
secret; white space around the token is left out), and whom to trust. Never OPENAI_API_KEY: it belongs to another
service, and would go to whichever host a URL names."""

TOKEN_PATTERN = r"^[A-Za-z0-9._~+/-]+=*$"
"""The characters of a bearer token: `b64token` of RFC 6750, section 2.1."""


@dataclass(frozen=True)
class Tls:
    """Files in PEM format for `grpcs` and `https`.

    Attributes:
        ca: whose certificates are trusted; None is the system's authorities.
        cert, key: the client's own certificate and key, where the server asks for one (mTLS).
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def context(self) -> ssl.SSLContext:
        """The client's side of a connection; InvalidRequest names a file that cannot be used."""
        if (self.cert is None) != (self.key is None):
            raise InvalidRequest("tls has only one of cert and key; give both", field="tls")
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise InvalidRequest(f"cannot use the CA certificate {self.ca}: {reason_of(error)}", field="tls") from error
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key, password=no_password)
        except OSError as error:
            raise InvalidRequest(
                f"cannot use the certificate {self.cert} with the key {self.key}: {reason_of(error)}", field="tls"
            ) from error
        return context


@dataclass(frozen=True)
class Credentials:
    """What one connection uses; `tls` is None where it is in plaintext."""

    token: str = field(default="", repr=False)
    tls: Tls | None = None

    def headers(self) -> dict[str, str]:
        """The header of a request over HTTP, or gRPC's metadata."""
        return {AUTHORIZATION: f"Bearer {self.token}"} if self.token else {}

    def verify(self) -> ssl.SSLContext:
        """What httpx takes as `verify`: in plaintext a context that trusts nobody, since httpx always makes one and to
        load the system's authorities takes tens of milliseconds, about the scoring of a batch.
        """
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if self.tls is None else self.tls.context()


def credentials(url: str, host: str, *, secure: bool, token: str | None, tls: Tls | None) -> Credentials:
    """The credentials for `url`; what is None comes from TEACHER_TOKEN or TEACHER_TOKEN_FILE, and TEACHER_CA.

    Warns when a token would cross a network in plaintext.

    Raises:
        InvalidRequest: the token has characters that no token has, its file cannot be read, or `tls` is given and
            `url` is plaintext.
    """
    token = _own_token() if token is None else token
    if token and not re.fullmatch(TOKEN_PATTERN, token):
        raise InvalidRequest(
            "the token has characters that no bearer token has, perhaps a blank or a line's end; "
            "allowed are letters, digits and -._~+/=",
            field="token",
        )
    if tls is not None and not secure:
        raise InvalidRequest(f"tls is given and {url} is plaintext; use grpcs:// or https://", field="tls")
    if token and not secure and not is_loopback(host):
        warnings.warn(f"the token for {url} crosses the network in plaintext; use grpcs:// or https://", stacklevel=3)
    if not secure:
        return Credentials(token)
    return Credentials(token, tls or Tls(ca=os.environ.get(CA_VARIABLE) or None))


def _own_token() -> str:
    """The token that the environment holds or names the file of; "" where it does neither."""
    token, path = os.environ.get(TOKEN_VARIABLE, ""), os.environ.get(TOKEN_FILE_VARIABLE, "")
    if token and path:
        raise InvalidRequest(f"{TOKEN_VARIABLE} and {TOKEN_FILE_VARIABLE} are both set; unset one", field="token")
    if not path:
        return token
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidRequest(f"{TOKEN_FILE_VARIABLE} is {path}: {reason}", field="token") from error


def is_loopback(host: str) -> bool:
    """Whether what is sent to `host`, a name or an address, stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def no_password() -> str:
    """What an encrypted key is opened with: without it OpenSSL would ask at the terminal, and wait."""
    return ""


def reason_of(error: OSError) -> str:
    """Why a certificate file cannot be used, in a few words: a file's error, or OpenSSL's."""
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return error.strerror or str(error)
