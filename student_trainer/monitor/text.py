"""Monitors of what the student wrote: its words, its repeats and its lengths."""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

RAW_DEFLATE = -15
"""zlib's window bits for a stream without header and checksum, which would be most of a short text."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Lengths:
    """Response tokens: mean and 95th percentile; and the share of responses cut at the budget, without EOS."""

    mean: float
    p95: float
    truncation_rate: float


def lengths(num_tokens: Sequence[int], is_finished: Sequence[bool]) -> Lengths:
    """Of B responses, whether each ended with EOS or a stop id."""
    return Lengths(
        mean=float(np.mean(num_tokens)),
        p95=float(np.quantile(num_tokens, 0.95)),
        truncation_rate=1 - float(np.mean(is_finished)),
    )


def hedge_frequency(texts: Iterable[str], num_tokens: int, hedges: Collection[str]) -> float:
    """Hedge words (lower-case, whole words) in the responses per response token.

    Raises:
        ValueError: there is no response token.
    """
    if num_tokens < 1:
        raise ValueError(f"a frequency over {num_tokens} tokens does not exist")
    words = frozenset(hedges)
    return sum(word in words for text in texts for word in _WORD.findall(text.lower())) / num_tokens


def repeat_ratio(responses: Sequence[Sequence[int]]) -> float:
    """Share of response tokens whose trailing 3-gram occurred earlier in the same response.

    Raises:
        ValueError: there is no response token.
    """
    num_tokens = sum(map(len, responses))
    if num_tokens < 1:
        raise ValueError("a repeat ratio over 0 tokens does not exist")
    trigrams = [list(zip(ids, ids[1:], ids[2:], strict=False)) for ids in responses]
    return sum(len(grams) - len(set(grams)) for grams in trigrams) / num_tokens


def zlib_ratio(texts: Iterable[str]) -> float:
    """Bytes of the texts, each deflated alone, over their bytes: about 0.5 for prose, near 0 for endless repeats.

    Very short texts do not compress, so it can pass 1. NaN when there is no text at all.
    """
    num_bytes = num_deflated = 0
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        num_bytes += len(raw)
        num_deflated += len(zlib.compress(raw, wbits=RAW_DEFLATE)) if raw else 0
    return num_deflated / num_bytes if num_bytes else float("nan")
