"""PPO's critic: what reward it expects from each token's state on, and how it learns to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from student_trainer.collate import Batch, per_token
from student_trainer.config import OptimConfig
from student_trainer.losses import token_mean
from student_trainer.losses.policy import clipped_value_loss
from student_trainer.optim import build_optimizer


@dataclass(frozen=True)
class Fit:
    """What the critic's updates of one step came to.

    Attributes:
        loss: their mean, in squared rewards; not finite where that of one was not.
        num_skipped: how many changed nothing, because their loss or gradient was not finite.
    """

    loss: float
    num_skipped: int


class Critic:
    """A model's backbone with a scalar head, which starts at 0, and an AdamW of its own at a constant rate.

    Its weights are stepped as they are, so it is loaded in float32.

    Args:
        backbone: the model without its LM head; trained in place.
        optim: the critic's rate, and all else as the student's.
        clip: of the values; see `losses.policy.clipped_value_loss`.
    """

    def __init__(self, backbone: PreTrainedModel, optim: OptimConfig, *, clip: float) -> None:
        head = torch.nn.Linear(backbone.config.hidden_size, 1, device=backbone.device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        # Always in evaluation: dropout would draw random numbers that no resumed run could draw again.
        self._model = torch.nn.ModuleDict({"backbone": backbone, "head": head}).eval()
        self._device = backbone.device
        self._optimizer = build_optimizer(list(self._model.parameters()), optim)
        self._micro_batch_size = optim.micro_batch_size
        self._max_grad_norm = optim.max_grad_norm
        self._clip = clip

    def values(self, batch: Batch) -> torch.Tensor:
        """The expected reward from each token's state on, before the token is known: float32 [B, T], NaN at padding."""
        return per_token(self._value, batch, self._micro_batch_size, self._device)

    def fit(self, batch: Batch, *, num_minibatches: int, num_epochs: int) -> Fit:
        """Steps towards the batch's `return_BT`, as many updates as the student's.

        An update whose loss or gradient is not finite is skipped: weights and optimiser stay as they were.
        """
        total, num_updates, num_skipped = 0.0, 0, 0
        for update in batch.updates(num_minibatches, num_epochs):
            update_loss = 0.0
            for micro in (part.to(self._device) for part in update.split(self._micro_batch_size)):
                assert micro.old_value_BT is not None
                assert micro.return_BT is not None
                loss_BT = clipped_value_loss(
                    self._value(micro), micro.old_value_BT, micro.return_BT, micro.mask_BT, clip=self._clip
                )
                loss = token_mean(loss_BT, micro.mask_BT, update.num_tokens)
                loss.backward()
                update_loss += loss.item()
            norm = float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_grad_norm))
            if math.isfinite(update_loss) and math.isfinite(norm):
                self._optimizer.step()
            else:
                num_skipped += 1
            self._optimizer.zero_grad(set_to_none=True)
            total += update_loss
            num_updates += 1
        return Fit(total / num_updates, num_skipped)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser."""
        return {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self._model.load_state_dict(state_dict["model"])
        self._optimizer.load_state_dict(state_dict["optimizer"])

    def _value(self, batch: Batch) -> torch.Tensor:
        """[B, T]: row t from the hidden state that predicts completion token t."""
        ids = torch.cat([batch.prompt_ids_BN, batch.completion_ids_BT], -1)
        mask = torch.cat([batch.prompt_mask_BN, batch.mask_BT.long()], -1)
        hidden = self._model["backbone"](
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        num_prompt = batch.prompt_ids_BN.shape[1]
        return self._model["head"](hidden[:, num_prompt - 1 : -1])[..., 0]
