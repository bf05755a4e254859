"""The memory of a distillation loss at a vocabulary of 151,936: by chunks, and with all logits at once.

    python -m tests.bench.loss_memory [--repeats 3]

One micro-batch of 4,096 completion tokens, float32, the default loss (top 20 of the student), through a model so narrow
that logits are nearly all there is. Each way is a process of its own. Its extra memory is its peak resident memory
(Linux: VmHWM, reset just before) above what was resident when the forward began, with weights and gradients in place;
so it holds whatever the allocator took, activations and the chunks' own. All at once takes about 8 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from student_trainer.collate import Batch, collate, completion_logits
from student_trainer.config import LossConfig
from student_trainer.lm_head import completion_hidden, find_head, logit_chunks
from student_trainer.losses import token_mean
from student_trainer.stages.objective import Objective
from tests.bench.alone import alone
from tests.bench.served import peak_bytes, reset_peak

VOCAB = 151_936
SEQUENCES, COMPLETION, PROMPT = 16, 256, 8
TOP_K = 20
GOAL = 1 / 8


def build_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def build_batch(num_sequences: int) -> Batch:
    """Random ids, and for a teacher's answers a made-up distribution: of a loss's memory they decide nothing."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> list[np.ndarray]:
        return list(rng.integers(3, VOCAB, (num_sequences, *shape)).astype(np.int32))

    def logp(*shape: int) -> list[np.ndarray]:
        return list(-rng.uniform(1, 9, (num_sequences, *shape)).astype(np.float32))

    return collate(
        ids(PROMPT),
        ids(COMPLETION),
        student_top_BTK=ids(COMPLETION, TOP_K),
        teacher_logp_BT=logp(COMPLETION),
        teacher_top_BTK=ids(COMPLETION, TOP_K),
        teacher_top_logp_BTK=logp(COMPLETION, TOP_K),
        teacher_candidate_logp_BTM=logp(COMPLETION, TOP_K),
    )


def by_chunks(model: PreTrainedModel, objective: Objective, batch: Batch) -> float:
    """As `student_trainer.learner` does it."""
    head, total = find_head(model), 0.0
    for logits_BTV, tokens in logit_chunks(model, head, completion_hidden(model, batch), batch):
        loss = token_mean(objective.loss(logits_BTV, tokens), tokens.mask_BT, batch.num_tokens)
        loss.backward()
        total += loss.item()
        del logits_BTV, loss
    return total


def at_once(model: PreTrainedModel, objective: Objective, batch: Batch) -> float:
    loss = token_mean(objective.loss(completion_logits(model, batch), batch), batch.mask_BT)
    loss.backward()
    return loss.item()


WAYS: dict[str, Callable[[PreTrainedModel, Objective, Batch], float]] = {"by chunks": by_chunks, "at once": at_once}


def measure(way: str) -> tuple[int, float, float]:
    """Extra bytes, seconds and the loss of one forward and backward."""
    model, objective = build_model(), Objective(LossConfig(), VOCAB, 1.0)
    WAYS[way](model, objective, build_batch(1))  # gradients and the allocator's own structures are there now
    batch = build_batch(SEQUENCES)
    before = reset_peak(os.getpid())
    started = time.perf_counter()
    loss = WAYS[way](model, objective, batch)
    seconds = time.perf_counter() - started
    return peak_bytes(os.getpid()) - before, seconds, loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    runs = {way: [alone(partial(measure, way)) for _ in range(repeats)] for way in WAYS}
    extra = {way: statistics.median(one[0] for one in of_way) for way, of_way in runs.items()}
    for way, of_way in runs.items():
        seconds = statistics.median(one[1] for one in of_way)
        spread = (max(one[0] for one in of_way) - min(one[0] for one in of_way)) / 2**20
        print(
            f"{way:10} {extra[way] / 2**20:9,.0f} MiB extra (spread {spread:.0f}) {seconds:6.1f} s  "
            f"loss {of_way[0][2]:.6f}"
        )
    ratio = extra["by chunks"] / extra["at once"]
    print(
        f"by chunks / at once: 1/{1 / ratio:.1f} at {SEQUENCES * COMPLETION} tokens, V = {VOCAB} (goal 1/{1 / GOAL:g})"
    )
    if ratio > GOAL:
        raise SystemExit("the chunked loss takes more memory than it may")


if __name__ == "__main__":
    main()
