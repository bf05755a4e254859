"""From a run's config to its stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from protos.credentials import Tls
from student_trainer.config import OpdStage, OpsdStage, SftStage, TrainConfig
from student_trainer.privileged import privileged_of
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.scoring import Scorer
from student_trainer.stages.base import Stage
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import FullVocabulary, Opd
from student_trainer.stages.sft import Sft
from student_trainer.student import Student
from student_trainer.tasks import Task
from student_trainer.teacher_identity import TEACHER_FILE, TeacherIdentity
from student_trainer.text import render_prompt


def build_stage(config: TrainConfig, student: Student, task: Task) -> Stage:
    """The stage that `config` describes; one that has a teacher has shaken hands with it.

    Raises:
        TeacherMismatch: the teacher cannot score this student.
        TeacherError: the teacher cannot be reached.
    """
    match config.stage:
        case SftStage():
            return Sft(student, task.train, problems_per_step=config.problems_per_step, seed=config.seed)
        case OpdStage() | OpsdStage():
            return _build_opd(config, config.stage, student, task)


def _build_opd(config: TrainConfig, stage: OpdStage | OpsdStage, student: Student, task: Task) -> Opd:
    assert config.teacher is not None
    rollout = config.rollout
    objective = Objective(stage.loss, student.vocab_size, rollout.temperature, eos_token_ids=student.eos_token_ids)
    full = FullVocabulary(config.watch.full_vocabulary_every, config.watch.full_vocabulary_rollouts, student.vocab_size)
    longest_prompt = max(len(render_prompt(student.tokenizer, problem.messages)) for problem in task.train)
    scorer = Scorer(
        config.teacher.url,
        temperature=rollout.temperature,
        timeout_s=config.teacher.timeout_s,
        max_wait_s=config.teacher.max_wait_s,
        tls=Tls(ca=config.teacher.ca) if config.teacher.ca else None,
        privileged=privileged_of(stage.privileged) if stage.privileged else None,
    )
    try:
        scorer.handshake(
            student.fingerprint,
            replace(objective.wanted, teacher_top_k=student.vocab_size) if full.every_steps else objective.wanted,
            longest_prompt + rollout.max_new_tokens,
            tokenizer=student.tokenizer,
        )
        TeacherIdentity.of(scorer.info).hold(Path(config.run) / TEACHER_FILE)
    except BaseException:
        scorer.close()
        raise
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_samples=rollout.samples_per_problem,
        top_ids=objective.wanted.student_top_k,
    )
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    return Opd(
        task,
        sampler,
        sampling,
        scorer,
        objective,
        full,
        problems_per_step=config.problems_per_step,
        seed=config.seed,
    )
