"""Certificates for tests, made when they run."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """A certificate authority, and the files of a server and of a client that it certified."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        self.server = self._pair(folder / "server", authority.issue_cert("127.0.0.1"))
        self.client = self._pair(folder / "client", authority.issue_cert("trainer@example.org"))

    @staticmethod
    def _pair(stem: Path, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        cert, key = stem.with_suffix(".pem"), stem.with_suffix(".key")
        for i, blob in enumerate(leaf.cert_chain_pems):
            blob.write_to_path(str(cert), append=i > 0)
        leaf.private_key_pem.write_to_path(str(key))
        return cert, key
