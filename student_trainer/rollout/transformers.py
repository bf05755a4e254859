"""Rollouts in process: one batched decoding loop over the student's own module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_trainer.rollout.base import Rollout, Sampler, SamplingParams
from student_trainer.rollout.cache import roomy_cache, takes_ready_mask
from student_trainer.rollout.draw import draw, streams
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt

PARTS = 8
"""In which a batch is handed over, at most: a request of its own for each of many rollouts costs more than it hides."""


class TransformersSampler(Sampler):
    """Samples from a transformers model; the model is read, never changed."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    def stream(
        self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]
    ) -> Iterator[dict[int, Rollout]]:
        """See `rollout.base.Sampler`; the model is in evaluation mode until the last part is handed over.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        if not problems:  # of a step's further problems a rank may have none
            return
        prompts = [render_prompt(self._tokenizer, problem.messages) for problem in problems]
        owners = [index for index in range(len(problems)) for _ in range(params.num_samples)]
        uniform_BT2 = streams(seeds, params.num_samples, params.max_new_tokens)
        was_training = self._model.training
        self._model.eval()
        ended: dict[int, Rollout] = {}
        try:
            for rows, *arrays in self._decode([prompts[owner] for owner in owners], params, uniform_BT2):
                ended |= {
                    row: self._rollout(problems[owners[row]], prompts[owners[row]], *of_row)
                    for row, *of_row in zip(rows.tolist(), *(array.numpy() for array in arrays), strict=True)
                }
                if len(ended) * PARTS >= len(owners):
                    yield ended
                    ended = {}
            if ended:
                yield ended
        finally:
            self._model.train(was_training)

    def close(self) -> None:
        """Nothing to free."""

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, uniform_BT2: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, *tuple[torch.Tensor, ...]]]:
        """Rows that have ended at the same token, and their ids, log-probs and top ids, on the CPU.

        A row leaves the batch with its last token, and its keys and values leave the cache.
        """
        device, budget = self._model.device, params.max_new_tokens
        input_ids, prompt_mask = left_pad(prompts, self._eos_token_ids[0])
        input_ids, prompt_mask, uniform_BT2 = input_ids.to(device), prompt_mask.to(device), uniform_BT2.to(device)
        eos = torch.tensor(self._eos_token_ids, device=device)
        position = prompt_mask.sum(-1, keepdim=True) - 1
        position_ids = (prompt_mask.cumsum(-1) - 1).clamp_min(0)
        cache = roomy_cache(self._model.config)
        rows = torch.arange(len(prompts), device=device)
        width = prompt_mask.shape[1]
        # Of the prompt and of every token that may follow: a step reads as far as it has come.
        mask = torch.cat([prompt_mask, prompt_mask.new_ones((len(prompts), budget))], -1)
        if not prompt_mask.all() and takes_ready_mask(self._model, cache):
            mask = mask[:, None, None].bool()
        attention_mask = prompt_mask
        ids_BT = input_ids.new_empty((len(prompts), budget))
        logp_BT = torch.empty(ids_BT.shape, device=device)
        top_BTK = ids_BT.new_empty((*ids_BT.shape, params.top_ids))
        for t in range(budget):
            logits_BV = (
                self._model(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            if params.temperature not in (0, 1):
                logits_BV = logits_BV / params.temperature
            logp_BV = logits_BV.log_softmax(-1)
            token_B = draw(logp_BV, params, uniform_BT2[:, t])
            ids_BT[:, t] = token_B
            logp_BT[:, t] = logp_BV.gather(-1, token_B[:, None])[:, 0]
            top_BTK[:, t] = logp_BV.topk(params.top_ids, -1).indices
            runs_B = ~torch.isin(token_B, eos)
            if t + 1 == budget:
                runs_B.fill_(False)
            if not runs_B.all():
                ended, *arrays = (
                    x[~runs_B].cpu() for x in (rows, *(x[:, : t + 1] for x in (ids_BT, logp_BT, top_BTK)))
                )
                if not arrays[1].isfinite().all():
                    raise FloatingPointError("the student's logits are not finite, so nothing can be sampled from them")
                yield ended, *arrays
                cache.batch_select_indices(runs_B)
                rows, token_B, position, mask, uniform_BT2, ids_BT, logp_BT, top_BTK = (
                    x[runs_B] for x in (rows, token_B, position, mask, uniform_BT2, ids_BT, logp_BT, top_BTK)
                )
                if not len(rows):
                    return
            position = position + 1
            input_ids, position_ids, attention_mask = token_B[:, None], position, mask[..., : width + t + 1]

    def _rollout(
        self, problem: Problem, prompt_ids: np.ndarray, ids_T: np.ndarray, logp_T: np.ndarray, top_TK: np.ndarray
    ) -> Rollout:
        completion_ids = ids_T.astype(np.int32)
        return Rollout(
            problem=problem,
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            logprobs=logp_T,
            top_ids=top_TK.astype(np.int32),
            is_finished=int(completion_ids[-1]) in self._eos_token_ids,
            text=str(self._tokenizer.decode(completion_ids, skip_special_tokens=True)),
        )


def left_pad(rows: Sequence[np.ndarray], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, int64 [B, max N], padded on the left so that every row ends in the same column."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.from_numpy(row.astype(np.int64))
        mask[i, width - len(row) :] = 1
    return ids, mask
