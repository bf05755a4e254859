"""Makes the secrets that are missing, a token for each client and a certificate for the TLS profile; keeps the others.

    python make_secrets.py TEACHER STUDENT      two folders that exist

TEACHER    tokens.toml (digests only), tls.pem and tls.key
STUDENT    NAME.token for each client, ca.pem
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

SCOPES = {"student-reverse": ["score"], "student-forward": ["score"], "metrics": []}
"""Who may do what; every client has a token of its own, so that the server shares itself fairly between them."""

TLS_NAME = "teacher-tls"
CERTIFICATE_DAYS = "825"


def make_secrets(teacher: Path, student: Path) -> None:
    """Fills the folders of the teachers and of the students, readable by their owner alone."""
    os.umask(0o077)
    if not (teacher / "tokens.toml").exists():
        tables = [_table(name, scopes, student / f"{name}.token") for name, scopes in SCOPES.items()]
        (teacher / "tokens.toml").write_text("\n".join(tables))
    if not (teacher / "tls.pem").exists():
        _make_certificate(teacher)
        shutil.copyfile(teacher / "tls.pem", student / "ca.pem")


def _table(name: str, scopes: list[str], file: Path) -> str:
    token = secrets.token_hex(32)
    file.write_text(token)
    return f'[{name}]\nsha256 = "{hashlib.sha256(token.encode()).hexdigest()}"\nscopes = {scopes}\n'


def _make_certificate(folder: Path) -> None:
    """Signed by itself, and so its own authority; 127.0.0.1 is for the health check."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", f"/CN={TLS_NAME}", "-addext", f"subjectAltName=DNS:{TLS_NAME},IP:127.0.0.1"]
    command += ["-days", CERTIFICATE_DAYS, "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.pem")]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    make_secrets(*map(Path, sys.argv[1:]))
