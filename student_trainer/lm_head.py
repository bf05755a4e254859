"""The student's logits a chunk of tokens at a time: full-width logits never exist for more than a chunk.

The model's own forward runs once, so that what wraps it (FSDP2's hooks, peft, gradient checkpointing) works as ever.
A hook at the LM head keeps the hidden states that reach it and lets a single row through. Afterwards the head is called
on the rows of the completion tokens, chunk by chunk; each chunk's loss is differentiated at once, down to its hidden
states, and its logits are freed: nothing is computed twice. One last backward takes the gathered gradient of the hidden
states through the rest of the model. That a loss is a sum over tokens is all this needs.

Under FSDP2 the head must belong to the root's group and stay unsharded between forward and backward, which is the
default: it is called outside of the model's forward, and ranks have different numbers of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_trainer.collate import Batch, collate

CHUNK_LOGITS = 2**25
"""Logits of one chunk, 128 MiB in float32: 220 tokens at a vocabulary of 151,936, a nineteenth of 4,096, and rows
enough for the head's matrix product to be bound by arithmetic. A small vocabulary's micro-batch is one chunk."""

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Names in a config of a factor, or a divisor, of the logits: Cohere, Granite and HyperCLOVA X, Falcon H1."""

CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Names in a config of the c in c tanh(logits / c): Gemma 2 to 4, RecurrentGemma."""

PROBE_TOKENS = 4


@dataclass(frozen=True)
class LmHead:
    """What a model does from the hidden states that reach its LM head to its logits.

    Attributes:
        finish: what the family does to the output of the head.
        vocab_size: V.
    """

    finish: Callable[[Tensor], Tensor]
    vocab_size: int

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk."""
        return max(1, CHUNK_LOGITS // self.vocab_size)

    def logits(self, model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
        """[N, V] of [N, D]."""
        return self.finish(_head_of(model)(hidden_ND))


def find_head(model: PreTrainedModel) -> LmHead:
    """The head of `model`, checked on a few tokens against the model's own logits.

    Raises:
        ValueError: there is no head, or what the model does to its output is not known here.
    """
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _HeadInput(model, max_rows=None) as caught:
            expected = model(input_ids=ids, use_cache=False).logits
            raw = _head_of(model)(caught.hidden)
    finally:
        model.train(was_training)
    tolerance = 8 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    for finish in _finishes(model.config.get_text_config()):
        logits = finish(raw)
        if logits.shape == expected.shape and float((logits - expected).abs().max()) <= tolerance:
            return LmHead(finish, expected.shape[-1])
    raise ValueError(
        f"{type(model).__name__} does more between its LM head and its logits than scale or cap them, so that they "
        "cannot be computed a chunk of tokens at a time: this model cannot be trained here"
    )


def completion_hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The hidden states [N, D] that predict the batch's N completion tokens, in the order of `batch.token_chunks`."""
    inputs = batch.model_inputs()
    with _HeadInput(model, max_rows=1) as caught:
        model(
            input_ids=inputs.ids_RW,
            attention_mask=inputs.attention_mask_RW,
            position_ids=inputs.position_ids_RW,
            use_cache=False,
        )
    return caught.hidden[inputs.row_N, inputs.column_N]


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Packs two short texts into a row beside a long one's, and asks whether the first changes the second.

    Raises:
        ValueError: it does.
    """
    short = np.arange(PROBE_TOKENS, dtype=np.int32)
    long = np.arange(2 * PROBE_TOKENS, dtype=np.int32)

    def last_hidden(first: np.ndarray) -> Tensor:
        texts = (long, first, short)
        batch = collate([text[:1] for text in texts], [text[1:] for text in texts]).packed()
        return completion_hidden(model, batch.to(model.device))[1 - PROBE_TOKENS :]

    was_training = model.training
    model.eval()
    try:
        is_apart = last_hidden(short).equal(last_hidden(short[::-1].copy()))
    finally:
        model.train(was_training)
    if not is_apart:
        raise ValueError(
            f"{type(model).__name__} lets a text see what is packed into the same row: set stage.packing to false"
        )


def logit_chunks(
    model: PreTrainedModel, head: LmHead, hidden_ND: Tensor, batch: Batch
) -> Iterator[tuple[Tensor, Batch]]:
    """Logits [1, C, V] of a chunk of completion tokens at a time, with the chunk as a batch [1, C].

    Args:
        hidden_ND: `completion_hidden` of the batch.

    With gradients the caller must call backward on what it makes of each chunk before it asks for the next. When all
    are through, the gradient goes on through the rest of the model.
    """
    gradient_ND = torch.zeros_like(hidden_ND)
    if not batch.num_tokens and hidden_ND.requires_grad:
        # Ranks reduce their gradients together, so an idle one needs those of the head as well: zeros.
        head.logits(model, hidden_ND.detach().requires_grad_()).sum().backward()
    start = 0
    for tokens in batch.token_chunks(head.chunk_tokens):
        rows = slice(start, start + tokens.num_tokens)
        hidden_CD = hidden_ND[rows].detach().requires_grad_(torch.is_grad_enabled())
        yield head.logits(model, hidden_CD)[None], tokens
        if hidden_CD.grad is not None:
            gradient_ND[rows] = hidden_CD.grad
        start += tokens.num_tokens
    if hidden_ND.requires_grad:
        hidden_ND.backward(gradient_ND)


class _HeadInput:
    """While entered: keeps what the LM head was called with, and lets at most `max_rows` of its rows through."""

    hidden: Tensor

    def __init__(self, model: PreTrainedModel, max_rows: int | None) -> None:
        self._head = _head_of(model)
        self._max_rows = max_rows

    def __enter__(self) -> Self:
        self._hook = self._head.register_forward_pre_hook(self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _catch(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self.hidden = args[0]
        if self._max_rows is None:
            return args
        return (self.hidden[: self._max_rows, : self._max_rows].detach(), *args[1:])


def _head_of(model: PreTrainedModel) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ValueError(f"{type(model).__name__} has no LM head (get_output_embeddings() is {head!r})")
    return head


def _finishes(config: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """What the config names comes first: on the tiny logits of a fresh model, a cap is hardly there."""
    for cap in (getattr(config, name, None) for name in CAPS):
        if cap:
            yield partial(_capped, cap=cap)
    for scale in (getattr(config, name, None) for name in SCALES):
        if scale:
            yield partial(torch.mul, other=scale)
            yield partial(torch.div, other=scale)
    yield _unchanged


def _capped(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _unchanged(logits: Tensor) -> Tensor:
    return logits
