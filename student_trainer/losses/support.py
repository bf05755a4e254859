"""Which ids a truncated loss compares, and how both models' log-probs are put in their order.

A list of ids per position is [B, T, N] with PAD_ID where there is none. On padding tokens every id is PAD_ID: the
teacher has no row there. Log-probs are in nats; one that does not exist is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.records import PAD_ID
from student_trainer.losses.pairing import check_present, check_same_shape


@dataclass(frozen=True)
class Support:
    """The ids a truncated loss compares at each position.

    Attributes:
        ids_BTS: int64; PAD_ID and repeated ids stay in place and are masked.
        mask_BTS: bool, true on the entries that count; no id counts twice at a position.
    """

    ids_BTS: Tensor
    mask_BTS: Tensor


def student_support(student_top_ids_BTK: Tensor) -> Support:
    """The student's top-K: S = K. It cannot pull up a token outside that list."""
    return _distinct(student_top_ids_BTK)


def teacher_support(teacher_top_ids_BTK: Tensor) -> Support:
    """The teacher's top-K: S = K. It pushes down a token outside that list only through the softmax."""
    return _distinct(teacher_top_ids_BTK)


def union_support(student_top_ids_BTK: Tensor, teacher_top_ids_BTK: Tensor) -> Support:
    """Both lists, the student's first: S is the sum of the widths; an id in both counts at the student's entry."""
    return _distinct(torch.cat([student_top_ids_BTK, teacher_top_ids_BTK], dim=-1))


def intersection_support(student_top_ids_BTK: Tensor, teacher_top_ids_BTK: Tensor) -> Support:
    """The ids in both lists, at the student's entries: S is its width. Empty where the lists have nothing in common."""
    student = _distinct(student_top_ids_BTK)
    _, shared_BTS = find(student.ids_BTS, teacher_top_ids_BTK)
    return Support(student.ids_BTS, student.mask_BTS & shared_BTS)


def gather(logp_BTV: Tensor, support: Support) -> Tensor:
    """Log-probs of the support's ids, [B, T, S]; -inf (no mass) and no gradient on masked entries.

    Raises:
        ValueError: an id that counts is outside the vocabulary.
    """
    vocab_size = logp_BTV.shape[-1]
    ids_BTS = support.ids_BTS.masked_fill(~support.mask_BTS, 0)
    _check_in_vocabulary(ids_BTS, vocab_size)
    return logp_BTV.gather(-1, ids_BTS).masked_fill(~support.mask_BTS, -torch.inf)


def log_tail(logp_BTV: Tensor, support: Support) -> Tensor:
    """log(1 - P): the mass outside the support, [B, T] in nats; -inf where nothing is.

    Summed over the ids outside, since 1 - P would cancel where P is near 1, as it is on most tokens.

    Raises:
        ValueError: an id that counts is outside the vocabulary.
    """
    ids_BTS = support.ids_BTS.masked_fill(~support.mask_BTS, 0)
    _check_in_vocabulary(ids_BTS, logp_BTV.shape[-1])
    counts_BTV = torch.zeros_like(logp_BTV, dtype=torch.uint8).scatter_add_(-1, ids_BTS, support.mask_BTS.byte())
    outside_BTV = logp_BTV.masked_fill(counts_BTV > 0, -torch.inf)
    is_empty_BT = outside_BTV.detach().amax(-1) == -torch.inf
    # logsumexp of -inf alone has a NaN gradient.
    log_sum_BT = outside_BTV.masked_fill(is_empty_BT[..., None], 0.0).logsumexp(-1)
    return log_sum_BT.masked_fill(is_empty_BT, -torch.inf)


def align(
    support: Support,
    candidate_ids_BTM: Tensor,
    candidate_logp_BTM: Tensor,
    top_ids_BTK: Tensor,
    top_logp_BTK: Tensor,
) -> Tensor:
    """The teacher's log-probs of the support's ids, [B, T, S], from the two lists of its reply.

    Each id is looked up by value, among the caller's candidates first, so no order of the lists is assumed. NaN where
    the reply does not hold the id, and on masked entries. A list that was not asked for has width 0.

    Raises:
        ValueError: ids and log-probs of one list differ in shape.
    """
    check_same_shape(candidate_ids_BTM=candidate_ids_BTM, candidate_logp_BTM=candidate_logp_BTM)
    check_same_shape(top_ids_BTK=top_ids_BTK, top_logp_BTK=top_logp_BTK)
    reply_ids = torch.cat([candidate_ids_BTM, top_ids_BTK], dim=-1)
    reply_logp = torch.cat([candidate_logp_BTM, top_logp_BTK], dim=-1)
    entry_BTS, found_BTS = find(support.ids_BTS, reply_ids)
    return reply_logp.gather(-1, entry_BTS).masked_fill(~(found_BTS & support.mask_BTS), torch.nan)


def find(ids_BTN: Tensor, among_BTM: Tensor) -> tuple[Tensor, Tensor]:
    """Where each id first occurs in the other list of its position: entry int64 and found bool, both [B, T, N].

    PAD_ID is never found. An entry means nothing where found is false.
    """
    sorted_BTM, order_BTM = among_BTM.long().sort(dim=-1, stable=True)
    ids_BTN = ids_BTN.long().contiguous()
    rank_BTN = torch.searchsorted(sorted_BTM, ids_BTN).clamp(max=among_BTM.shape[-1] - 1)
    found_BTN = (sorted_BTM.gather(-1, rank_BTN) == ids_BTN) & (ids_BTN != PAD_ID)
    return order_BTM.gather(-1, rank_BTN), found_BTN


def full_vocabulary(top_ids_BTV: Tensor, top_logp_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """A top-K reply with K = V, put in vocabulary order: [B, T, V].

    Positions outside the mask get the uniform distribution: finite, so that a loss over them has no NaN to leak.

    Raises:
        ValueError: shapes differ, or a position of the mask misses an id, repeats one or has a NaN log-prob.
    """
    check_same_shape(top_ids_BTV=top_ids_BTV, top_logp_BTV=top_logp_BTV)
    check_same_shape(top_ids_BTV=top_ids_BTV[..., 0], mask_BT=mask_BT)
    vocab_size = top_ids_BTV.shape[-1]
    ids_BTV, logp_BTV = top_ids_BTV.long(), top_logp_BTV
    if not mask_BT.all():
        ids_BTV = torch.where(mask_BT[..., None], ids_BTV, torch.arange(vocab_size, device=ids_BTV.device))
        logp_BTV = logp_BTV.masked_fill(~mask_BT[..., None], -math.log(vocab_size))
    _check_in_vocabulary(ids_BTV, vocab_size)
    ordered_BTV = torch.full_like(logp_BTV, torch.nan).scatter_(-1, ids_BTV, logp_BTV)
    if ordered_BTV.isnan().any():
        check_present(top_logp_BTV, mask_BT[..., None].expand_as(top_logp_BTV))
        # No log-prob is missing, so an id is.
        *position, missing_id = ordered_BTV.isnan().nonzero()[0].tolist()
        num_distinct = vocab_size - int(ordered_BTV[tuple(position)].isnan().sum())
        raise ValueError(
            f"position {tuple(position)} holds {num_distinct} distinct ids of {vocab_size}: {missing_id} is missing"
        )
    return ordered_BTV


def _distinct(ids_BTS: Tensor) -> Support:
    ids_BTS = ids_BTS.long()
    entry_BTS, found_BTS = find(ids_BTS, ids_BTS)
    is_first_BTS = entry_BTS == torch.arange(ids_BTS.shape[-1], device=ids_BTS.device)
    return Support(ids_BTS, found_BTS & is_first_BTS)


def _check_in_vocabulary(ids: Tensor, vocab_size: int) -> None:
    lowest, highest = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        first = ((ids < 0) | (ids >= vocab_size)).nonzero()[0].tolist()
        raise ValueError(f"id {int(ids[tuple(first)])} at {tuple(first)} is outside the vocabulary of {vocab_size}")
