"""How likely a model finds the completions of a batch, without a gradient."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from student_trainer import losses
from student_trainer.collate import Batch, completion_logits, per_token


@torch.no_grad()
def sequence_logp(model: PreTrainedModel, batch: Batch, *, temperature: float, micro_batch_size: int) -> torch.Tensor:
    """log_softmax(logits / temperature) at each completion token in nats, float32 [B, T] on the CPU; NaN at padding.

    Args:
        model: read in evaluation mode, and left as it was.
        batch: the sequences.
        temperature: above 0.
        micro_batch_size: sequences in one forward pass.
    """

    def of_tokens(micro: Batch) -> torch.Tensor:
        logp_BTV = losses.log_probs(completion_logits(model, micro), temperature)
        return logp_BTV.gather(-1, micro.completion_ids_BT[..., None])[..., 0]

    was_training = model.training
    model.eval()
    try:
        return per_token(of_tokens, batch, micro_batch_size, model.device)
    finally:
        model.train(was_training)
