"""From a pool's URL to the URLs of its replicas: commas, and names that stand for several addresses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from protos.errors import InvalidRequest, NotReady

DNS = "dns+"
"""Marks a URL whose host is looked up: every address is a replica. It is asked for, never guessed: `localhost` and
every dual-stack host have two addresses of one server."""

DNS_FORMS = "dns+grpc://host:port or dns+http://host:port"

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a host and port, IPv6 ones without brackets; raises OSError where there are none."""


def entries(url: str) -> tuple[str, ...]:
    """The entries of a pool's URL; InvalidRequest on a repeated one and on a name that cannot be looked up."""
    found = tuple(entry.strip() for entry in url.split(","))
    for entry in found:
        if found.count(entry) > 1:
            raise InvalidRequest(f"{entry!r} is twice in {url!r}; name every replica once")
        if entry.startswith(DNS):
            _host_and_port(entry)
    return found


async def replica_urls(entry: str, resolve: Resolve) -> list[str]:
    """The URLs that an entry stands for now; NotReady when its name has no address."""
    if not entry.startswith(DNS):
        return [entry]
    scheme, host, port = _host_and_port(entry)
    try:
        addresses = await resolve(host, port)
    except OSError as error:
        raise NotReady(f"{entry} cannot be looked up: {error.strerror or error}") from error
    return [
        f"{scheme}://[{address}]:{port}" if ":" in address else f"{scheme}://{address}:{port}" for address in addresses
    ]


async def look_up(host: str, port: int) -> Sequence[str]:
    """The addresses that this machine's resolver gives, each once."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _host_and_port(entry: str) -> tuple[str, str, int]:
    try:
        parts = urlsplit(entry.removeprefix(DNS))
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InvalidRequest(f"{entry!r} is not a name of replicas ({error}); it must be {DNS_FORMS}") from error
    if parts.scheme in ("grpcs", "https"):
        raise InvalidRequest(
            f"{entry!r}: a certificate belongs to a name, not to the addresses behind it; "
            "list the replicas' own names, separated by commas"
        )
    if parts.scheme not in ("grpc", "http") or not host or not port or parts.path.strip("/") or "@" in parts.netloc:
        raise InvalidRequest(f"{entry!r} is not a name of replicas; it must be {DNS_FORMS}")
    return parts.scheme, host, port
