"""This machine's address as another sees it."""

from __future__ import annotations

import socket


def address_towards(host: str, port: int) -> str:
    """The local address on the way to that host; no packet is sent.

    Raises:
        OSError: the name is unknown, or there is no way.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
