"""Checksums of a folder's files: written when it is whole, verified before it is trusted.

The file is `sha256sum`'s, so that anyone can check a folder: sha256sum -c SHA256SUMS
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MANIFEST = "SHA256SUMS"


def seal(folder: Path) -> None:
    """Writes the checksums of every file in the folder and below it."""
    lines = [f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in _files(folder)]
    (folder / MANIFEST).write_text("".join(lines))


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in a few words; "" when every file is as it was sealed."""
    try:
        lines = (folder / MANIFEST).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return f"its {MANIFEST} cannot be read"
    sealed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    present = {str(path.relative_to(folder)) for path in _files(folder)}
    if sealed.keys() != present:
        return f"its files are not those of its {MANIFEST}: {', '.join(sorted(sealed.keys() ^ present))}"
    for name, digest in sealed.items():
        try:
            is_whole = _sha256(folder / name) == digest
        except OSError as error:
            return f"{name}: {error.strerror}"
        if not is_whole:
            return f"{name} has another checksum than when it was written"
    return ""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
