"""Which of `student_trainer.monitor` run on what a step brings, and under which names."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from student_trainer import distributed, losses, monitor
from student_trainer.alarms import SKIPPED
from student_trainer.collate import Batch, completion_logits
from student_trainer.config import TrainConfig
from student_trainer.run_folder import Row
from student_trainer.stages.base import Collected, Metrics

DECILE_ENTROPY = "entropy_decile_"
DECILE_SHARE = "share_decile_"
"""Before the number of a decile: a step's metrics have the first alone, see `full_row`."""


@torch.no_grad()
def watch_tokens(
    logp_BTV: torch.Tensor,
    batch: Batch,
    paired: tuple[losses.Support, torch.Tensor] | None,
    *,
    top_k: int,
    eos_token_ids: Sequence[int],
) -> Metrics:
    """Monitors of the tokens in `batch`, each a mean over them, so that pieces of a batch add up by their tokens.

    The entropy by decile is its sum over the decile's tokens alone, beside their share, by which `full_row` divides.

    Args:
        logp_BTV: the student's log-probs.
        paired: the ids that the loss compares, and the teacher's log-probs of them, [B, T, S]; None where it has none.
        top_k: K of the overlap.
        eos_token_ids: what ends a response.
    """
    assert batch.student_top_BTK is not None
    assert batch.teacher_logp_BT is not None
    assert batch.teacher_top_BTK is not None
    assert batch.teacher_top_logp_BTK is not None
    p_BTV = logp_BTV.exp()
    sampled_BT = logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0]
    overlap = monitor.overlap(
        batch.student_top_BTK,
        logp_BTV.gather(-1, batch.student_top_BTK.clamp_min(0)),  # of PAD_ID, which is in no overlap, any
        batch.teacher_top_BTK[..., :top_k],
        batch.teacher_top_logp_BTK[..., :top_k],
    )
    entropy_BT = monitor.entropy(p_BTV, logp_BTV)
    values = {
        "reverse_kl": monitor.sampled_reverse_kl(sampled_BT, batch.teacher_logp_BT),
        "overlap_ratio": overlap.ratio_BT,
        "overlap_student_mass": overlap.student_mass_BT,
        "overlap_teacher_mass": overlap.teacher_mass_BT,
        "eos_probability": monitor.mass_of(eos_token_ids, p_BTV),
        "entropy": entropy_BT,
    }
    if paired is not None:
        values |= _of_support(logp_BTV, p_BTV, *paired)
    if batch.teacher_entropy_BT is not None:
        values["teacher_entropy"] = batch.teacher_entropy_BT
        values["entropy_gap"] = entropy_BT - batch.teacher_entropy_BT
    if batch.decile_BT is not None:
        for d in range(monitor.NUM_DECILES):
            share_BT = (batch.decile_BT == d).float()
            values |= {f"{DECILE_SHARE}{d}": share_BT, f"{DECILE_ENTROPY}{d}": entropy_BT * share_BT}
    return monitor.token_means(values, batch.mask_BT)


def _of_support(
    logp_BTV: torch.Tensor, p_BTV: torch.Tensor, support: losses.Support, teacher_logp_BTS: torch.Tensor
) -> dict[str, torch.Tensor]:
    logp_BTS = losses.gather(logp_BTV, support)
    mass = monitor.support_mass(logp_BTS, teacher_logp_BTS, support.mask_BTS)
    unnormalised_BT = monitor.unnormalised_loss(logp_BTS, teacher_logp_BTS, support.mask_BTS)
    outside_BT = monitor.outside_square_mass(p_BTV, support)
    bias = monitor.bias(logp_BTS, teacher_logp_BTS, support.mask_BTS, outside_BT)
    return {
        "support_student_mass": mass.student_BT,
        "support_teacher_mass": mass.teacher_BT,
        "support_gap": mass.gap_BT,
        "unnormalised_loss": unnormalised_BT,
        "unnormalised_negative_share": (unnormalised_BT < 0).float(),
        "bias_norm": bias.norm_BT,
        "pull_norm": bias.pull_norm_BT,
        "flipped_share": bias.flipped_share_BT,
        "flipped_score_share": bias.flipped_score_share_BT,
    }


@torch.no_grad()
def watch_full_vocabulary(model: PreTrainedModel, batch: Batch, temperature: float) -> Metrics:
    """Exact divergences and entropies over the whole vocabulary, without dropout, means over the tokens of `batch`.

    Args:
        batch: with the teacher's log-probs of every id as its candidates.
        temperature: of both models' log-probs.
    """
    was_training = model.training
    model.eval()
    try:
        return _full_vocabulary(model, batch, temperature)
    finally:
        model.train(was_training)


def _full_vocabulary(model: PreTrainedModel, batch: Batch, temperature: float) -> Metrics:
    metrics: Metrics = {}
    for one in batch.split(1):
        one = one.to(model.device)
        teacher_logp_BTV = one.teacher_candidate_logp_BTM
        assert teacher_logp_BTV is not None
        logp_BTV = losses.log_probs(completion_logits(model, one), temperature)
        entropy_BT = monitor.entropy(logp_BTV.exp(), logp_BTV)
        teacher_entropy_BT = monitor.entropy(teacher_logp_BTV.exp(), teacher_logp_BTV)
        values = {
            "full/reverse_kl": losses.reverse_kl(logp_BTV, teacher_logp_BTV),
            "full/forward_kl": losses.forward_kl(logp_BTV, teacher_logp_BTV),
            "full/entropy": entropy_BT,
            "full/teacher_entropy": teacher_entropy_BT,
            "full/entropy_gap": entropy_BT - teacher_entropy_BT,
        }
        for name, value in monitor.token_means(values, one.mask_BT).items():
            metrics[name] = metrics.get(name, 0.0) + value * one.num_tokens / batch.num_tokens
    return metrics


def watch_collected(
    collected: Collected, rewards: Sequence[float], model: PreTrainedModel, config: TrainConfig
) -> Metrics:
    """Monitors of all ranks' data of a step before it is learnt from; `watch_s` is what they took here."""
    started = time.perf_counter()
    counts = [
        monitor.count(rollout.text, rollout.completion_ids.tolist(), config.watch.hedges, rollout.is_finished)
        for rollout in collected.rollouts
    ]
    own = (counts, rewards)
    metrics = watch_written([own] if collected.is_whole else distributed.gather(own))
    full, num_tokens = {}, 0
    if (batch := collected.full_vocabulary) is not None:
        full, num_tokens = watch_full_vocabulary(model, batch, config.rollout.temperature), batch.num_tokens
    metrics |= distributed.means(full, num_tokens)
    return metrics | {"watch_s": time.perf_counter() - started}


def full_row(num_steps: int, data: Metrics, watched: Metrics, learnt: Row, last_row: Row) -> Row:
    """A step's line in metrics.jsonl, with what follows from two of its figures or from the line before."""
    row = {"step": num_steps, **data, **watched, **_by_decile(learnt)}
    row["watch_s"] = watched["watch_s"] + learnt["watch_s"]
    # Of the student, and of a critic that learnt before it did.
    row[SKIPPED] = last_row.get(SKIPPED, 0) + learnt[SKIPPED] + data.get(SKIPPED, 0)
    if "bias_norm" in row:
        row["bias_ratio"] = monitor.bias_ratio(row["bias_norm"], row["pull_norm"])
    return row


def _by_decile(learnt: Row) -> Row:
    """`learnt` with each decile's mean entropy in place of its sum and its share; 0 where no token was in it."""
    row = dict(learnt)
    for name in [name for name in learnt if DECILE_SHARE in name]:
        share, mean = row.pop(name), name.replace(DECILE_SHARE, DECILE_ENTROPY)
        row[mean] = row[mean] / share if share else 0.0
    return row


def watch_written(parts: Sequence[tuple[Sequence[monitor.Counts], Sequence[float]]]) -> Metrics:
    """Monitors of what the student wrote in one step, from each rank's counts and rewards; none of no text."""
    responses = [one for counts, _ in parts for one in counts]
    rewards = [reward for _, own in parts for reward in own]
    if not responses:
        return {}
    lengths = monitor.lengths(responses)
    return {
        "reward": sum(rewards) / len(rewards),
        "length_mean": lengths.mean,
        "length_p95": lengths.p95,
        "truncation_rate": lengths.truncation_rate,
        "hedge_frequency": monitor.hedge_frequency(responses),
        "repeat_ratio": monitor.repeat_ratio(responses),
        "zlib_ratio": monitor.zlib_ratio(responses),
    }
