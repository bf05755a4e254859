"""Rollouts in process: one batched decoding loop over the student's own module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from student_trainer.distributed import gathered
from student_trainer.rollout.base import Rollout, SamplingParams
from student_trainer.rollout.draw import draw, streams
from student_trainer.tasks import Problem
from student_trainer.text import render_prompt


class TransformersSampler:
    """Samples from a transformers model; the model is read, never changed."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    @torch.no_grad()
    def sample(self, problems: Sequence[Problem], params: SamplingParams, *, seeds: Sequence[int]) -> list[Rollout]:
        """See `rollout.base.Sampler`.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        prompts = [render_prompt(self._tokenizer, problem.messages) for problem in problems]
        owners = [index for index in range(len(problems)) for _ in range(params.num_samples)]
        uniform_BT2 = streams(seeds, params.num_samples, params.max_new_tokens)
        was_training = self._model.training
        self._model.eval()
        try:
            with gathered(self._model):
                ids_BT, logp_BT, top_BTK = self._decode([prompts[owner] for owner in owners], params, uniform_BT2)
        finally:
            self._model.train(was_training)
        return [
            self._rollout(problems[owner], prompts[owner], ids, logp, top)
            for owner, ids, logp, top in zip(owners, ids_BT.numpy(), logp_BT.numpy(), top_BTK.numpy(), strict=True)
        ]

    def _decode(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, uniform_BT2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, log-probs and top ids of every row, on the CPU; a row that has ended holds -1."""
        device = self._model.device
        input_ids, mask = left_pad(prompts, self._eos_token_ids[0])
        input_ids, mask, uniform_BT2 = input_ids.to(device), mask.to(device), uniform_BT2.to(device)
        eos = torch.tensor(self._eos_token_ids, device=device)
        position = mask.sum(-1, keepdim=True) - 1
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = DynamicCache(config=self._model.config)
        is_running = torch.ones(len(prompts), dtype=torch.bool, device=device)
        columns: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for t in range(params.max_new_tokens):
            logits_BV = (
                self._model(
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                .logits[:, -1]
                .float()
            )
            logp_BV = (logits_BV / (params.temperature or 1.0)).log_softmax(-1)
            token_B = draw(logp_BV, params, uniform_BT2[:, t])
            columns.append(
                (
                    token_B.masked_fill(~is_running, -1).cpu(),
                    logp_BV.gather(-1, token_B[:, None])[:, 0].cpu(),
                    logp_BV.topk(params.top_ids, -1).indices.cpu(),
                )
            )
            is_running &= ~torch.isin(token_B, eos)
            if not is_running.any():
                break
            position = position + 1
            input_ids, position_ids = token_B[:, None], position
            mask = torch.cat([mask, torch.ones_like(position)], -1)
        ids, logps, tops = zip(*columns, strict=True)
        logp_BT = torch.stack(logps, 1)
        if not logp_BT.isfinite().all():
            raise FloatingPointError("the student's logits are not finite, so nothing can be sampled from them")
        return torch.stack(ids, 1), logp_BT, torch.stack(tops, 1)

    def _rollout(
        self, problem: Problem, prompt_ids: np.ndarray, ids_T: np.ndarray, logp_T: np.ndarray, top_TK: np.ndarray
    ) -> Rollout:
        num_tokens = int((ids_T >= 0).sum())
        completion_ids = ids_T[:num_tokens].astype(np.int32)
        return Rollout(
            problem=problem,
            prompt_ids=prompt_ids,
            completion_ids=completion_ids,
            logprobs=logp_T[:num_tokens].astype(np.float32),
            top_ids=top_TK[:num_tokens].astype(np.int32),
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
