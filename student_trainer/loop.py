"""The one loop: data -> loss -> step -> watch -> log -> save. What differs between algorithms is in `stages`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from student_trainer import checkpoint, distributed
from student_trainer.config import TrainConfig
from student_trainer.evaluate import Evaluation, evaluate
from student_trainer.learner import Learner
from student_trainer.progress import Progress
from student_trainer.rollout.base import Rollout
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.run_folder import Row, RunFolder
from student_trainer.stages import build_stage
from student_trainer.student import Student, load_student
from student_trainer.tasks import Task, build_task

NOTHING = -1
"""Before the evaluation that is logged as step 0."""


@distributed.joined()
def train(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Runs, or goes on with, the training run that `config` describes; returns its last checkpoint's folder.

    Raises:
        ConfigError: the run folder, the model or the config is wrong.
        TeacherError, TeacherMismatch: the teacher failed, or cannot score this student.
        PeerLostError: another process of this run, started by torchrun, has ended.
        FloatingPointError: the loss or the gradient is not finite; the last checkpoint is intact.
    """
    run = RunFolder(config)
    task = build_task(config.task)
    student = load_student(config.model)
    learner = Learner.build(student, config)
    resumed_from = run.last_checkpoint
    num_done = learner.restore(resumed_from) if resumed_from else 0
    if resumed_from and num_done == config.steps:
        return resumed_from
    run.forget_after(num_done if resumed_from else NOTHING)
    stage = build_stage(config, student, task)
    try:
        with Progress(config, start=num_done, quiet=quiet or not distributed.is_main()) as progress:
            if not resumed_from:
                run.log({"step": 0, **_evaluate(student, task, config).metrics()})
            for step in range(num_done, config.steps):
                started = time.perf_counter()
                collected = stage.collect(step)
                row: Row = {"step": step + 1, **distributed.means(collected.metrics, collected.batch.num_sequences)}
                row |= learner.step(stage, collected)
                row["step_s"] = time.perf_counter() - started
                if _is_due(step + 1, config.eval.every_steps, config.steps):
                    row |= _evaluate(student, task, config).metrics()
                run.log(row)
                run.log_rollouts(_samples(step + 1, collected.rollouts[: config.rollouts_logged], task))
                if _is_due(step + 1, config.checkpoint.every_steps, config.steps):
                    learner.save(run.checkpoints, step + 1, keep=config.checkpoint.keep)
                progress.advance(row)
    finally:
        stage.close()
    return checkpoint.found(run.checkpoints)[-1]


def _is_due(num_steps: int, every_steps: int, last: int) -> bool:
    return num_steps == last or (every_steps > 0 and num_steps % every_steps == 0)


def _evaluate(student: Student, task: Task, config: TrainConfig) -> Evaluation:
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return evaluate(sampler, task, config.eval, max_new_tokens=budget)


def _samples(num_steps: int, rollouts: Sequence[Rollout], task: Task) -> list[Row]:
    return [
        {
            "step": num_steps,
            "problem": rollout.problem.id,
            "prompt": [{"role": m.role, "content": m.content} for m in rollout.problem.messages],
            "text": rollout.text,
            "num_tokens": len(rollout.completion_ids),
            "is_finished": rollout.is_finished,
            "reward": task.reward(rollout.problem, rollout.text),
        }
        for rollout in rollouts
    ]
