"""From lists of unequal length to padded tensors, and from a batch to the student's logits.

Prompts are padded on the left and completions on the right, so that row t of every sequence's logits is the prediction
of its completion token t, in one slice.

    ids      [pad pad p0 p1 p2 | c0 c1 pad]      N = 5 (padded), T = 3 (padded)
    logits             rows  4    5  (6)         columns N-1 .. N+T-2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from protos.records import PAD_ID, Int32
from student_trainer.rollout.transformers import left_pad


@dataclass(frozen=True)
class Batch:
    """Padded sequences, and whatever a teacher said of them.

    Attributes:
        prompt_ids_BN: int64, padded on the left.
        prompt_mask_BN: int64, 1 where a prompt token is.
        completion_ids_BT: int64, padded on the right.
        mask_BT: bool, True where a completion token is: the tokens that a loss may count.
        sampled_logp_BT: float32, the log-prob with which each token was sampled; None when it was not sampled here.
        student_top_BTK: int64, the student's most likely ids when it sampled; None likewise.
        teacher_logp_BT: float32, the teacher's log-prob of each completion token; None without a teacher.
        teacher_top_BTK, teacher_top_logp_BTK: the teacher's most likely ids and log-probs; None without a teacher.
        teacher_candidate_logp_BTM: the teacher's log-probs at `student_top_BTK`; None without a teacher.
        advantage_BT: float32, how much better than expected each token was; None where nothing is rewarded.
        reference_logp_BT: float32, a reference policy's log-prob of each token; None without a reference.
        weight_BT: float32, what each token's loss is multiplied by; None where every token counts once.
        old_value_BT, return_BT: float32, the critic's value of each token's state, and its target; None without one.
        teacher_entropy_BT: the teacher's entropy in nats; None from a teacher that cannot give it.
        decile_weight_BTD: see `monitor.decile_weights`; None where nothing is watched by position.

    Padded positions hold token id 0 in the two sequences, PAD_ID in lists of ids, and NaN log-probs.
    """

    prompt_ids_BN: torch.Tensor
    prompt_mask_BN: torch.Tensor
    completion_ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    sampled_logp_BT: torch.Tensor | None = None
    student_top_BTK: torch.Tensor | None = None
    teacher_logp_BT: torch.Tensor | None = None
    teacher_top_BTK: torch.Tensor | None = None
    teacher_top_logp_BTK: torch.Tensor | None = None
    teacher_candidate_logp_BTM: torch.Tensor | None = None
    advantage_BT: torch.Tensor | None = None
    reference_logp_BT: torch.Tensor | None = None
    weight_BT: torch.Tensor | None = None
    old_value_BT: torch.Tensor | None = None
    return_BT: torch.Tensor | None = None
    teacher_entropy_BT: torch.Tensor | None = None
    decile_weight_BTD: torch.Tensor | None = None

    @classmethod
    def empty(cls) -> Batch:
        """A batch of no sequences: nothing to learn from."""
        ids = torch.zeros((0, 0), dtype=torch.int64)
        return cls(ids, ids, ids, ids.bool())

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.mask_BT.shape[0]

    @property
    def num_tokens(self) -> int:
        """Completion tokens of the whole batch: the denominator of a token mean."""
        return int(self.mask_BT.sum())

    def split(self, num_sequences: int) -> Iterator[Batch]:
        """Micro-batches of at most `num_sequences` sequences, in order, cut to the longest completion in each."""
        for start in range(0, self.num_sequences, num_sequences):
            rows = slice(start, start + num_sequences)
            longest = int(self.mask_BT[rows].sum(-1).max())
            widest = int((self.prompt_mask_BN[rows].sum(-1)).max())
            cut = {
                field.name: value[rows, -widest:] if field.name.startswith("prompt") else value[rows, :longest]
                for field in fields(self)
                if (value := getattr(self, field.name)) is not None
            }
            yield Batch(**cut)

    def token_chunks(self, num_tokens: int) -> Iterator[Batch]:
        """The completion tokens alone, at most `num_tokens` at a time: one sequence [1, C], without prompt or padding.

        Tokens are in the order of the sequences; a chunk does not say where in its sequence a token is.
        """
        rows, columns = self.mask_BT.nonzero(as_tuple=True)
        for start in range(0, len(rows), num_tokens):
            chunk = slice(start, start + num_tokens)
            picked = {
                field.name: value[:1, :0]
                if field.name.startswith("prompt")
                else value[rows[chunk], columns[chunk]][None]
                for field in fields(self)
                if (value := getattr(self, field.name)) is not None
            }
            yield Batch(**picked)

    def updates(self, num_minibatches: int, num_epochs: int) -> Iterator[Batch]:
        """The batch of each optimiser update: `num_epochs` passes over at most `num_minibatches` equal parts, in order.

        Equal but for the last, which may have fewer sequences; an empty batch gives no update.
        """
        for _ in range(num_epochs):
            yield from self.split(max(1, -(-self.num_sequences // num_minibatches)))

    def idle(self) -> Batch:
        """The same sequences with no token that counts: a forward and backward pass of no effect."""
        return replace(self, mask_BT=torch.zeros_like(self.mask_BT))

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {f.name: value.to(device) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return Batch(**moved)


def collate(prompts: Sequence[Int32], completions: Sequence[Int32], **per_token: Sequence[np.ndarray] | None) -> Batch:
    """Pads B prompts and completions, and any per-token arrays of Batch given by name ([T] or [T, K] each).

    Raises:
        ValueError: an empty batch, an empty prompt, or an array whose first axis is not its completion's length.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a batch needs at least one sequence, and every prompt at least one token")
    for name, rows in per_token.items():
        if rows is not None and [len(row) for row in rows] != [len(ids) for ids in completions]:
            raise ValueError(f"{name} does not have one row for each completion token of each sequence")
    prompt_ids, prompt_mask = left_pad(prompts, pad_id=0)
    mask = right_pad([np.ones(len(ids), bool) for ids in completions], False)
    padded = {
        name: right_pad(rows, np.nan if np.issubdtype(rows[0].dtype, np.floating) else PAD_ID)
        for name, rows in per_token.items()
        if rows is not None
    }
    return Batch(prompt_ids, prompt_mask, right_pad(completions, 0), mask, **padded)


def right_pad(rows: Sequence[np.ndarray], fill: float) -> torch.Tensor:
    """[B, max T, ...], padded with `fill`; int32 becomes int64.

    Raises:
        ValueError: rows of different kinds or widths.
    """
    first = rows[0]
    if any(row.dtype != first.dtype or row.shape[1:] != first.shape[1:] for row in rows):
        raise ValueError(f"rows differ in kind: {sorted({(str(row.dtype), row.shape[1:]) for row in rows})}")
    width = max(len(row) for row in rows)
    padded = np.full((len(rows), width, *first.shape[1:]), fill, first.dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    tensor = torch.from_numpy(padded)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


@torch.no_grad()
def per_token(
    of_tokens: Callable[[Batch], torch.Tensor], batch: Batch, micro_batch_size: int, device: torch.device
) -> torch.Tensor:
    """What a frozen model says of each completion token, float32 [B, T] on the CPU; NaN where there is no token.

    Args:
        of_tokens: from a micro-batch on `device` to [B, T].
        batch: the sequences.
        micro_batch_size: how many of them at a time.
        device: where the model is.
    """
    rows = [
        row[mask].float().cpu().numpy()
        for micro in (part.to(device) for part in batch.split(micro_batch_size))
        for row, mask in zip(of_tokens(micro), micro.mask_BT, strict=True)
    ]
    return right_pad(rows, np.nan)


def completion_logits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The student's logits [B, T, V]: row t predicts completion token t. Only those rows go through the LM head."""
    ids = torch.cat([batch.prompt_ids_BN, batch.completion_ids_BT], -1)
    mask = torch.cat([batch.prompt_mask_BN, batch.mask_BT.long()], -1)
    num_completion = batch.completion_ids_BT.shape[1]
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=num_completion + 1,
    ).logits
    return logits[:, :-1]
