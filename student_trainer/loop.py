"""The one loop: data -> loss -> step -> watch -> log -> save. What differs between algorithms is in `stages`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from protos.errors import TeacherError
from student_trainer import checkpoint, distributed, interrupt
from student_trainer.alarms import Alarm, Alarms
from student_trainer.config import TrainConfig
from student_trainer.doubts import Doubts
from student_trainer.evaluate import Evaluation, evaluate
from student_trainer.learner import Learner
from student_trainer.progress import Progress
from student_trainer.roll_back import adjusted, marks
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.run_folder import RunFolder
from student_trainer.samples import sample_rows
from student_trainer.stages import Stage, build_stage
from student_trainer.stages.watch import full_row, watch_collected
from student_trainer.stopped import Stopped, StoppedByRule
from student_trainer.student import Student, load_student
from student_trainer.tasks import Task, build_task
from student_trainer.teacher_identity import TeacherMismatch
from student_trainer.tracking import follow

NOTHING = -1
"""Before the evaluation that is logged as step 0."""

logger = logging.getLogger(__name__)


@distributed.joined()
def train(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Runs, or goes on with, the training run that `config` describes; returns its last checkpoint's folder.

    Raises:
        ConfigError: the run folder, the model or the config is wrong.
        TeacherError, TeacherMismatch: the teacher failed, or cannot score this student.
        Stopped: a rule, the teacher's absence, a signal or a lost process ended the run early; it can go on.
        RunFolderError, CheckpointError: the disk refused; the last checkpoint is whole.
    """
    config.check_ranks(distributed.world_size())
    run = distributed.by_main(lambda: RunFolder(config))
    with interrupt.deferred_signals():
        # A roll-back changes the run folder; what follows is a run that is gone on with, like any other.
        while not (last := _go_on(run, config, quiet=quiet)):
            pass
    return last


def _go_on(run: RunFolder, config: TrainConfig, *, quiet: bool) -> Path | None:
    """From the last checkpoint to the last step, whose checkpoint is returned; None after a roll-back."""
    roll_backs = distributed.by_main(run.roll_backs)
    now = adjusted(config, roll_backs)
    task = build_task(config.task)
    student = load_student(config.model)
    learner = Learner.build(student, now)
    resumed_from = distributed.by_main(run.intact_checkpoint)
    num_done = learner.restore(resumed_from) if resumed_from else 0
    if resumed_from and num_done == config.steps:
        return resumed_from
    distributed.by_main(lambda: run.forget_after(num_done if resumed_from else NOTHING))
    alarms = Alarms(config.watch, distributed.by_main(run.metrics), roll_backs)
    if alarm := alarms.standing():
        raise StoppedByRule(alarm.sentence)
    doubts = Doubts(config)
    stage = build_stage(now, student, task, quiet=quiet)
    save = partial(_save, run, learner, stage, alarms, config)
    try:
        if resumed_from:
            checkpoint.restore_stage(resumed_from, stage)
        is_quiet = quiet or not distributed.is_main()
        with follow(run, config), Progress(config, start=num_done, quiet=is_quiet) as progress:
            if not resumed_from:
                run.log({"step": 0, **_evaluate(student, task, config).metrics()})
                if any(rule.action == "roll_back" for rule in config.watch.rules):
                    save(0)
            for step in range(num_done, config.steps):
                interrupt.tell_ranks()
                interrupt.raise_if_requested()
                started = time.perf_counter()
                with distributed.gathered(student.model), _kept_without_data(step, save):
                    collected = distributed.agreed(partial(stage.collect, step))
                    rewards = collected.rewards or [task.reward(r.problem, r.text) for r in collected.rollouts]
                    watched = watch_collected(collected, rewards, student.model, config)
                with _kept_without_data(step, save):
                    learnt = learner.step(stage, collected)
                num_texts = len(collected.rollouts) or collected.batch.num_sequences
                data = distributed.means(collected.metrics | collected.late_metrics(), num_texts)
                row = full_row(step + 1, data, watched, learnt, alarms.last_row)
                row["step_s"] = time.perf_counter() - started
                if _is_due(step + 1, config.eval.every_steps, config.steps):
                    row |= _evaluate(student, task, config).metrics()
                row = distributed.from_main(row)  # with its seconds: what is decided by it is decided alike
                run.log(row | marks(roll_backs, step + 1))
                run.log_rollouts(sample_rows(step + 1, collected, rewards, config.rollouts_logged, student.tokenizer))
                progress.advance(row)
                match _sound(alarms.observe(row), run):
                    case Alarm(action="roll_back") as alarm:
                        distributed.by_main(partial(run.roll_back, alarm))
                        return None
                    case Alarm(action="stop") as alarm:
                        save(step + 1)
                        raise StoppedByRule(alarm.sentence)
                interrupt.tell_ranks()
                if interrupt.is_requested() or _is_due(step + 1, config.checkpoint.every_steps, config.steps):
                    save(step + 1)
                for sentence in doubts.of(row):
                    logger.warning("%s", sentence)
    finally:
        stage.close()
    return checkpoint.found(run.checkpoints)[-1]


@contextmanager
def _kept_without_data(step: int, save: Callable[[int], None]) -> Iterator[None]:
    """Saves what was learnt before step s, where on some rank there are no data of it to be had."""
    try:
        yield
    except (TeacherError, TeacherMismatch, Stopped):
        if step > 0:
            save(step)
        raise


def _sound(alarms: Sequence[Alarm], run: RunFolder) -> Alarm | None:
    """Writes a step's alarms down and says them; returns the gravest."""
    for alarm in alarms:
        run.log_alarm(alarm.row())
        logger.warning("%s", alarm.sentence)
    return alarms[-1] if alarms else None


def _save(run: RunFolder, learner: Learner, stage: Stage, alarms: Alarms, config: TrainConfig, num_steps: int) -> None:
    """Writes the checkpoint of `num_steps` unless it is there; keeps one from before any breach that may roll back."""
    run.flush()
    done = [checkpoint.num_steps_of(path) for path in distributed.by_main(lambda: checkpoint.found(run.checkpoints))]
    if num_steps not in done:
        num_since = sum(before >= alarms.breached_since for before in done)
        # The new one, those from the breach on, and the last good one.
        keep = max(config.checkpoint.keep, 1 + num_since + 1)
        learner.save(run.checkpoints, num_steps, stage, keep=keep)


def _is_due(num_steps: int, every_steps: int, last: int) -> bool:
    return num_steps == last or (every_steps > 0 and num_steps % every_steps == 0)


def _evaluate(student: Student, task: Task, config: TrainConfig) -> Evaluation:
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    budget = config.eval.max_new_tokens or config.rollout.max_new_tokens
    with distributed.gathered(student.model):
        return evaluate(sampler, task, config.eval, max_new_tokens=budget)
