"""PPO's critic: what reward it expects from each token's state on, and how it learns to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from transformers import PreTrainedModel

from student_trainer import distributed
from student_trainer.collate import Batch, per_token
from student_trainer.config import OptimConfig
from student_trainer.distributed import sharded_like, whole_on_main
from student_trainer.in_step import by_shares, micro_batches, num_tokens_of_all
from student_trainer.losses import token_mean
from student_trainer.losses.policy import clipped_value_loss
from student_trainer.optim import build_optimizer, clip_by_global_norm


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
        self._model = ValueModel(backbone, head).eval()
        self._device = backbone.device
        if distributed.world_size() > 1:
            distributed.shard(self._model, set(backbone._no_split_modules or ()), torch.float32)
        self._optimizer = build_optimizer(list(self._model.parameters()), optim)
        self._micro_batch_size = optim.micro_batch_size
        self._max_grad_norm = optim.max_grad_norm
        self._clip = clip

    def values(self, batch: Batch) -> torch.Tensor:
        """The expected reward from each token's state on, before the token is known: float32 [B, T], NaN at padding."""
        of_batch = partial(per_token, self._model, micro_batch_size=self._micro_batch_size, device=self._device)
        with distributed.gathered(self._model):
            return by_shares(of_batch, batch)

    def fit(self, minibatches: Sequence[Batch], *, num_epochs: int) -> Fit:
        """Steps towards the batches' `return_BT`, one update for each minibatch of each epoch; each is a rank's share.

        An update whose loss or gradient is not finite is skipped: weights and optimiser stay as they were.
        """
        total, num_updates, num_skipped = 0.0, 0, 0
        for update in chain.from_iterable(repeat(minibatches, num_epochs)):
            update_loss, num_tokens = 0.0, num_tokens_of_all(update)
            for micro in micro_batches(update, self._micro_batch_size, self._device):
                assert micro.old_value_BT is not None
                assert micro.return_BT is not None
                loss_BT = clipped_value_loss(
                    self._model(micro), micro.old_value_BT, micro.return_BT, micro.mask_BT, clip=self._clip
                )
                loss = token_mean(loss_BT, micro.mask_BT, num_tokens)
                loss.backward()
                update_loss += loss.item()
            update_loss = distributed.sums({"loss": update_loss})["loss"]
            norm = clip_by_global_norm(self._model.parameters(), self._max_grad_norm)
            if math.isfinite(update_loss) and math.isfinite(norm):
                self._optimizer.step()
            else:
                num_skipped += 1
            self._optimizer.zero_grad(set_to_none=True)
            total += update_loss
            num_updates += 1
        return Fit(total / num_updates, num_skipped)

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimiser, whole, on rank 0; every rank calls it."""
        optimizer = self._optimizer.state_dict()
        moments = {index: whole_on_main(of_weight) for index, of_weight in optimizer["state"].items()}
        return {"model": whole_on_main(self._model.state_dict()), "optimizer": optimizer | {"state": moments}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, by however many ranks."""
        model, optimizer = state_dict["model"], state_dict["optimizer"]
        held = self._model.state_dict()
        self._model.load_state_dict({name: sharded_like(weight, held[name]) for name, weight in model.items()})
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        moments = {
            index: {
                # All but the number of updates are of the weight's shape.
                name: sharded_like(value, weights[index]) if value.ndim else value
                for name, value in of_weight.items()
            }
            for index, of_weight in optimizer["state"].items()
        }
        self._optimizer.load_state_dict(optimizer | {"state": moments})


class ValueModel(torch.nn.Module):
    """A backbone and a scalar head in one forward pass."""

    def __init__(self, backbone: PreTrainedModel, head: torch.nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, batch: Batch) -> torch.Tensor:
        """[B, T]: row t from the hidden state that predicts completion token t."""
        ids = torch.cat([batch.prompt_ids_BN, batch.completion_ids_BT], -1)
        mask = torch.cat([batch.prompt_mask_BN, batch.mask_BT.long()], -1)
        hidden = self.backbone(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
            use_cache=False,
        ).last_hidden_state
        num_prompt = batch.prompt_ids_BN.shape[1]
        return self.head(hidden[:, num_prompt - 1 : -1])[..., 0]
