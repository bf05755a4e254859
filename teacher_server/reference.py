"""A model run by transformers alone, to compare a teacher with; shares no code with the engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from protos.records import Float32, Int32
from teacher_server.tokenizer import ChatTokenizer


class TransformersReference:
    """One causal language model on this machine's CPU; OSError or ValueError where it cannot be loaded."""

    def __init__(self, model: str, dtype: str) -> None:
        disable_progress_bar()
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model = loaded.eval()
        self.fingerprint = ChatTokenizer.load(model).fingerprint(loaded.get_output_embeddings().weight.shape[0])

    @torch.inference_mode()
    def logprobs(self, context_ids: Int32, completion_ids: Int32, temperature: float) -> Float32:
        """float32 [T, V] in nats: log_softmax(logits / temperature) for each completion token."""
        ids = torch.from_numpy(np.concatenate([context_ids, completion_ids]).astype(np.int64))
        logits_SV = self._model(ids[None]).logits[0].float()
        # The prediction of position p is made at position p - 1.
        logits_TV = logits_SV[len(context_ids) - 1 : -1]
        return torch.log_softmax(logits_TV / temperature, dim=-1).numpy()
