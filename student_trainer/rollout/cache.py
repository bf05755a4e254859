"""A cache of keys and values that grows in place: a token is written beside those before it, and nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

ROOM = 64
"""Tokens that a buffer has room for beyond those it must hold, at least; and a quarter of those, so that a sequence is
copied a few times in all, where transformers' own cache copies it at every token."""


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """transformers' cache for this model, with room where a layer keeps every token; sliding windows are as ever."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def takes_ready_mask(model: PreTrainedModel, cache: DynamicCache) -> bool:
    """Whether one more token of each row may come with its attention mask ready-made, bool [B, 1, 1, tokens so far],
    True at the row's own: what transformers would make anew of the one over [B, tokens so far] for every token.

    It must be the same in all layers, and the model one that leaves its masks to transformers (`masking_utils`).
    """
    config = model.config.get_text_config()
    is_same_everywhere = all(type(layer) is RoomyLayer for layer in cache.layers)
    return is_same_everywhere and model._supports_attention_backend and config._attn_implementation == "sdpa"


class RoomyLayer(DynamicLayer):
    """`keys` and `values` are views of the filled part of buffers, [B, H, room, D]."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """See DynamicLayer; the buffers come with the first tokens."""
        super().lazy_initialization(key_states, value_states)
        self._key_room, self._value_room = key_states[:, :, :0], value_states[:, :, :0]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See DynamicLayer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        length = filled + key_states.shape[-2]
        if self._key_room.shape[-2] < length:
            self._key_room = _grown(self._key_room, filled, length)
            self._value_room = _grown(self._value_room, filled, length)
        self._key_room[:, :, filled:length] = key_states
        self._value_room[:, :, filled:length] = value_states
        self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See DynamicLayer."""
        length = self.get_seq_length()
        if length:
            self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
            self.keys, self.values = self._key_room[:, :, :length], self._value_room[:, :, :length]


def _grown(buffer: torch.Tensor, filled: int, length: int) -> torch.Tensor:
    """A larger one that begins with what the buffer holds."""
    batch, heads, _, width = buffer.shape
    larger = buffer.new_empty((batch, heads, length + max(ROOM, length // 4), width))
    larger[:, :, :filled] = buffer[:, :, :filled]
    return larger
