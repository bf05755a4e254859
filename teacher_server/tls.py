"""The server's side of TLS: one certificate for both listeners, and whose clients' certificates are asked for."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.credentials import no_password, reason_of
from teacher_server.config import StartError


@dataclass(frozen=True)
class ServerTls:
    """A certificate chain, its key, and the authority that clients' certificates must come from; None asks for none."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTP; StartError names a file that cannot be used."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.cert, self.key, password=no_password)
        except OSError as error:
            raise StartError(
                f"cannot use --tls-cert {self.cert} with --tls-key {self.key}: {reason_of(error)}"
            ) from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except OSError as error:
                raise StartError(f"cannot use --tls-client-ca {self.client_ca}: {reason_of(error)}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For gRPC; StartError as `context`, which checks the files first: gRPC would only find out at a handshake."""
        self.context()
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            root_certificates=None if self.client_ca is None else self.client_ca.read_bytes(),
            require_client_auth=self.client_ca is not None,
        )
