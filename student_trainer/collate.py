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

from protos.records import PAD_ID, Int32, ScoreResult
from student_trainer.distributed import share
from student_trainer.rollout.transformers import left_pad


@dataclass(frozen=True)
class ModelInputs:
    """What one forward pass reads, and where in it the completion tokens are predicted. R rows of W tokens.

    Attributes:
        ids_RW: int64.
        attention_mask_RW: int64, 0 where padding is; None where the positions alone say what belongs together.
        position_ids_RW: int64.
        row_N, column_N: int64, the place that predicts each of the N completion tokens of the batch, in their order.
    """

    ids_RW: torch.Tensor
    attention_mask_RW: torch.Tensor | None
    position_ids_RW: torch.Tensor
    row_N: torch.Tensor
    column_N: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Padded sequences, and whatever a teacher said of them: at once, or when `scored` has waited for it.

    Attributes:
        prompt_ids_BN: int64, padded on the left.
        prompt_mask_BN: int64, 1 where a prompt token is.
        completion_ids_BT: int64, padded on the right.
        mask_BT: bool, True where a completion token is: the tokens that a loss may count.
        sampled_logp_BT: float32, the log-prob with which each token was sampled; None when it was not sampled here.
        student_top_BTK: int64, the student's most likely ids when it sampled; None likewise.
        teacher_logp_BT: float32, the teacher's log-prob of each completion token; None without a teacher.
        teacher_top_BTK, teacher_top_logp_BTK: the teacher's most likely ids and log-probs; None without a teacher.
        teacher_candidate_logp_BTM: the teacher's log-probs at `student_top_BTK`, or of every id in order where the loss
            compares whole vocabularies; None without a teacher.
        advantage_BT: float32, how much better than expected each token was; None where nothing is rewarded.
        reference_logp_BT: float32, a reference policy's log-prob of each token; None without a reference.
        weight_BT: float32, what each token's loss is multiplied by; None where every token counts once.
        old_value_BT, return_BT: float32, the critic's value of each token's state, and its target; None without one.
        teacher_entropy_BT: the teacher's entropy in nats; None from a teacher that cannot give it.
        decile_BT: see `monitor.deciles`; None where nothing is watched by position.
        answers_B: waits for the teacher's score of each sequence; None without a teacher, and once the scores are here.

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
    decile_BT: torch.Tensor | None = None
    answers_B: Sequence[Callable[[], ScoreResult]] | None = None

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
                name: value[rows, -widest:] if name.startswith("prompt") else value[rows, :longest]
                for name, value in self._tensors().items()
            }
            yield replace(self, **cut, answers_B=self.answers_B and self.answers_B[rows])

    def token_chunks(self, num_tokens: int) -> Iterator[Batch]:
        """The completion tokens alone, at most `num_tokens` at a time: one sequence [1, C], without prompt or padding.

        Tokens are in the order of the sequences; a chunk does not say where in its sequence a token is.
        """
        assert self.answers_B is None, "a loss needs what is still on its way: call scored() first"
        rows, columns = self.mask_BT.nonzero(as_tuple=True)
        for start in range(0, len(rows), num_tokens):
            chunk = slice(start, start + num_tokens)
            picked = {
                name: value[:1, :0] if name.startswith("prompt") else value[rows[chunk], columns[chunk]][None]
                for name, value in self._tensors().items()
            }
            yield Batch(**picked, answers_B=None)

    def shares(self, num_minibatches: int) -> list[Batch]:
        """This rank's share of each of at most `num_minibatches` equal parts, in order, of a batch that all ranks have.

        Equal but for the last, which may have fewer sequences; none of an empty batch. A rank without a sequence of
        its own in some part has an idle one.
        """
        parts = self.split(max(1, -(-self.num_sequences // num_minibatches)))
        return [part.share() if share(range(part.num_sequences)) else part.rows([0]).idle() for part in parts]

    def share(self) -> Batch:
        """This rank's share of a batch that all ranks have."""
        return self.rows(share(range(self.num_sequences)))

    def rows(self, rows: Sequence[int]) -> Batch:
        """Those of the sequences, as wide as they are here."""
        index = torch.tensor(rows, dtype=torch.int64)
        picked = {name: value[index] for name, value in self._tensors().items()}
        return replace(self, **picked, answers_B=self.answers_B and [self.answers_B[row] for row in rows])

    def idle(self) -> Batch:
        """The same sequences with no token that counts: a forward and backward pass of no effect."""
        return replace(self, mask_BT=torch.zeros_like(self.mask_BT), answers_B=None)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def scored(self) -> Batch:
        """With what the teacher said of each sequence, once it has; the batch itself where nothing is on its way.

        Raises:
            TeacherError, TeacherGone, TeacherMismatch: see `Scorer.score`.
        """
        if self.answers_B is None:
            return self
        return self.with_scores([answer() for answer in self.answers_B])

    def with_scores(self, results: Sequence[ScoreResult]) -> Batch:
        """With the teacher's scores of its sequences, in their order."""
        entropies = [result.entropy for result in results if result.entropy is not None]
        per_token = {
            "teacher_logp_BT": [result.sampled_logprobs for result in results],
            "teacher_top_BTK": [result.top_ids for result in results],
            "teacher_top_logp_BTK": [result.top_logprobs for result in results],
            "teacher_candidate_logp_BTM": [result.candidate_logprobs for result in results],
            **({"teacher_entropy_BT": entropies} if entropies else {}),
        }
        padded = {name: pad_tokens(rows).to(self.mask_BT.device) for name, rows in per_token.items()}
        return replace(self, **padded, answers_B=None)

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def model_inputs(self) -> ModelInputs:
        """One row for each sequence."""
        ids = torch.cat([self.prompt_ids_BN, self.completion_ids_BT], -1)
        mask = torch.cat([self.prompt_mask_BN, self.mask_BT.long()], -1)
        row_N, place_N = self.mask_BT.nonzero(as_tuple=True)
        first = self.prompt_ids_BN.shape[1] - 1
        return ModelInputs(ids, mask, (mask.cumsum(-1) - 1).clamp_min(0), row_N, place_N + first)

    def packed(self) -> PackedBatch:
        """The same sequences, several to a row of the forward pass."""
        return PackedBatch(**{field.name: getattr(self, field.name) for field in fields(self)})


class PackedBatch(Batch):
    """A batch whose sequences stand one after the other in the rows of a forward pass, none wider than the longest.

    Every sequence starts at position 0, from which transformers makes an attention mask that is causal within each
    sequence and closed between them (`masking_utils.find_packed_sequence_indices`); a row's padding is one more of
    them. `lm_head.check_packing` finds out whether a model keeps to it.
    """

    def model_inputs(self) -> ModelInputs:
        """As few rows as first-fit-decreasing finds."""
        mask = torch.cat([self.prompt_mask_BN.bool(), self.mask_BT], -1)
        ids = torch.cat([self.prompt_ids_BN, self.completion_ids_BT], -1)
        lengths = mask.sum(-1).tolist()
        rows = first_fit_decreasing(lengths, max(lengths))
        stands: dict[int, tuple[int, int]] = {}
        used = [0] * len(rows)
        for r, row in enumerate(rows):
            for b in row:
                stands[b] = (r, used[r])
                used[r] += lengths[b]
        row_B, start_B = torch.tensor([stands[b] for b in range(len(lengths))], device=ids.device).unbind(-1)
        used_R = torch.tensor(used, device=ids.device)

        sequence_L, column_L = mask.nonzero(as_tuple=True)
        place_L = (mask.cumsum(-1) - 1)[mask]
        row_L, at_L = row_B[sequence_L], start_B[sequence_L] + place_L
        ids_RW = ids.new_zeros((len(rows), max(lengths)))
        ids_RW[row_L, at_L] = ids[mask]
        position_RW = torch.arange(max(lengths), device=ids.device) - used_R[:, None]
        position_RW[row_L, at_L] = place_L
        is_completion_L = column_L >= self.prompt_ids_BN.shape[1]
        return ModelInputs(ids_RW, None, position_RW, row_L[is_completion_L], at_L[is_completion_L] - 1)


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens, each a list of sequences by number: the longest first, each into the first row
    that has room (Johnson 1973, "Near-optimal bin packing algorithms": at most 11/9 of the fewest rows and one more).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        row = next((r for r, left in enumerate(room) if left >= lengths[b]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(b)
        room[row] -= lengths[b]
    return rows


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
    padded = {name: pad_tokens(rows) for name, rows in per_token.items() if rows is not None}
    return replace(Batch(prompt_ids, prompt_mask, right_pad(completions, 0), mask), **padded)


def pad_tokens(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """What is known of each sequence's tokens, padded as in `Batch`; see `right_pad`."""
    return right_pad(rows, np.nan if np.issubdtype(rows[0].dtype, np.floating) else PAD_ID)


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
