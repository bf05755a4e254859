"""Monitors of what the student wrote: its words, its repeats and its lengths.

Each is a ratio of sums of counts, one `Counts` a response, so that processes tell each other counts and no texts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

RAW_DEFLATE = -15
"""zlib's window bits for a stream without header and checksum, which would be most of a short text."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Counts:
    """What is counted of one response.

    Attributes:
        num_tokens: T.
        is_finished: whether it ended with EOS or a stop id.
        num_hedges: hedge words.
        num_repeats: tokens whose trailing 3-gram occurred earlier in the response.
        num_bytes, num_deflated: of its text in UTF-8, before and after deflation.
    """

    num_tokens: int
    is_finished: bool
    num_hedges: int
    num_repeats: int
    num_bytes: int
    num_deflated: int


@dataclass(frozen=True)
class Lengths:
    """Response tokens: mean and 95th percentile; and the share of responses cut at the budget, without EOS."""

    mean: float
    p95: float
    truncation_rate: float


def count(text: str, ids: Sequence[int], hedges: Collection[str], is_finished: bool) -> Counts:
    """Of a response's text and token ids; `hedges` are whole words, in lower case."""
    words = frozenset(hedges)
    trigrams = list(zip(ids, ids[1:], ids[2:], strict=False))
    raw = text.encode("utf-8", "surrogatepass")
    return Counts(
        num_tokens=len(ids),
        is_finished=is_finished,
        num_hedges=sum(word in words for word in _WORD.findall(text.lower())),
        num_repeats=len(trigrams) - len(set(trigrams)),
        num_bytes=len(raw),
        num_deflated=len(zlib.compress(raw, wbits=RAW_DEFLATE)) if raw else 0,
    )


def lengths(responses: Sequence[Counts]) -> Lengths:
    """Of B responses."""
    num_tokens = [response.num_tokens for response in responses]
    return Lengths(
        mean=float(np.mean(num_tokens)),
        p95=float(np.quantile(num_tokens, 0.95)),
        truncation_rate=1 - float(np.mean([response.is_finished for response in responses])),
    )


def hedge_frequency(responses: Sequence[Counts]) -> float:
    """Hedge words per response token.

    Raises:
        ValueError: there is no response token.
    """
    return sum(response.num_hedges for response in responses) / _num_tokens(responses)


def repeat_ratio(responses: Sequence[Counts]) -> float:
    """Share of response tokens whose trailing 3-gram occurred earlier in the same response.

    Raises:
        ValueError: there is no response token.
    """
    return sum(response.num_repeats for response in responses) / _num_tokens(responses)


def zlib_ratio(responses: Sequence[Counts]) -> float:
    """Bytes of the texts, each deflated alone, over their bytes: about 0.5 for prose, near 0 for endless repeats.

    Very short texts do not compress, so it can pass 1. NaN when there is no text at all.
    """
    num_bytes = sum(response.num_bytes for response in responses)
    return sum(response.num_deflated for response in responses) / num_bytes if num_bytes else float("nan")


def _num_tokens(responses: Sequence[Counts]) -> int:
    num_tokens = sum(response.num_tokens for response in responses)
    if num_tokens < 1:
        raise ValueError(f"a ratio over {num_tokens} tokens does not exist")
    return num_tokens
