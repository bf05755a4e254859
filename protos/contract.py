"""Which version of teacher.proto a server speaks, and what needs which.

The package name `teacher.v1` stands for what stays compatible; the version counts what was added within it that an
older server refuses or reads as something else. Fields that an older server may ignore do not count.
"""

from __future__ import annotations

SHARED_CANDIDATES = 1
"""From here on `ScoreItem.candidate_ids` may be [1, M], the same ids at every position."""

VERSION = 1
"""What this package speaks, and what its servers say of themselves. Servers of before there were versions say 0."""


def too_old(version: int, needed: int, what: str) -> list[str]:
    """Why a server of that version cannot be asked for `what`, which came with `needed`; empty where it can."""
    if version >= needed:
        return []
    return [f"it speaks version {version} of the contract, and {what} need version {needed}: update the server"]
