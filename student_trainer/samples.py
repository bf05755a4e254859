"""The lines of rollouts.jsonl: what the student wrote, for a person to read."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from student_trainer.run_folder import Row
from student_trainer.stages import Collected

DECIMALS = 4
"""Of a teacher's advantage in nats: for colours and for reading."""


def sample_rows(
    num_steps: int, collected: Collected, rewards: Sequence[float], num_rows: int, tokenizer: PreTrainedTokenizerBase
) -> list[Row]:
    """The first `num_rows` rollouts of a step, with the teacher's advantage log q - log p of each sampled token."""
    rows: list[Row] = []
    for rollout, reward in zip(collected.rollouts[:num_rows], rewards, strict=False):
        rows.append(
            {
                "step": num_steps,
                "problem": rollout.problem.id,
                "prompt": [{"role": m.role, "content": m.content} for m in rollout.problem.messages],
                "text": rollout.text,
                "num_tokens": len(rollout.completion_ids),
                "is_finished": rollout.is_finished,
                "reward": reward,
                "tokens": [str(tokenizer.decode([token_id])) for token_id in rollout.completion_ids.tolist()],
            }
        )
    num_scored = min(len(rows), collected.batch.num_sequences)  # a batch without equal groups may be smaller, or empty
    if num_scored and (teacher_logp_BT := collected.batch.rows(range(num_scored)).scored().teacher_logp_BT) is not None:
        for row, rollout, teacher_logp_T in zip(rows, collected.rollouts, teacher_logp_BT.numpy(), strict=False):
            advantage_T = teacher_logp_T[: len(rollout.logprobs)] - rollout.logprobs
            row["teacher_advantage"] = [round(float(nats), DECIMALS) for nats in advantage_T]
    return rows
