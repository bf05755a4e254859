"""How much a teacher wants to take back what stands there: its mass on the first tokens of hedge words. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from protos.records import PAD_ID, Float32


class Vocabulary(Protocol):
    """The part of a transformers tokenizer that is needed."""

    def get_vocab(self) -> dict[str, int]: ...  # noqa: D102

    def decode(self, token_ids: list[int]) -> Any: ...  # noqa: D102


def word_ids(words: Iterable[str], tokenizer: Vocabulary) -> list[int]:
    """The ids, in order, that are one of the words, with or without a space or a capital: " wait", "wait", " Wait".

    A word that the tokenizer cuts in pieces has none: with its first piece alone, every other word that begins with it
    would count too.
    """
    spellings = {spelling for word in words for spelling in (word, word.capitalize())}
    return sorted(i for i in tokenizer.get_vocab().values() if tokenizer.decode([i]).strip() in spellings)


def revision_mass(candidate_logp_TM: Float32) -> NDArray[np.float64]:
    """The mass on all M candidates at each position, [T]; NaN pads."""
    return np.exp(np.nan_to_num(candidate_logp_TM.astype(np.float64), nan=-np.inf)).sum(-1)


def candidates(ids: list[int], num_tokens: int) -> NDArray[np.int32]:
    """The same ids at each of T positions, int32 [T, M]; where there are none, one column of PAD_ID."""
    return np.tile(np.asarray(ids or [PAD_ID], np.int32), (num_tokens, 1))
