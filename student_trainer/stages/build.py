"""From a run's config to its stage."""

from __future__ import annotations

from protos.credentials import Tls
from student_trainer.config import OpdStage, OpsdStage, RolloutConfig, SftStage, TrainConfig
from student_trainer.privileged import privileged_of, refusals
from student_trainer.rollout.base import Sampler, SamplingParams
from student_trainer.rollout.remote import RemoteSampler
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.scoring import Scorer, TeacherMismatch
from student_trainer.stages.base import Stage
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import Opd
from student_trainer.stages.sft import Sft
from student_trainer.student import Student
from student_trainer.tasks import Task
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
    objective = Objective(stage.loss, student.vocab_size, rollout.temperature)
    told = privileged_of(config.privileged) if config.privileged else None
    if told is not None:
        for problem in task.train:  # a problem without what the teacher is to be told is found now, not at its step
            told(problem)
    longest_prompt = max(len(render_prompt(student.tokenizer, problem.messages)) for problem in task.train)
    scorer = Scorer(
        config.teacher.url,
        temperature=rollout.temperature,
        timeout_s=config.teacher.timeout_s,
        tls=Tls(ca=config.teacher.ca) if config.teacher.ca else None,
        privileged=told,
    )
    try:
        scorer.handshake(
            student.fingerprint,
            objective.wanted,
            longest_prompt + rollout.max_new_tokens,
            tokenizer=student.tokenizer,
        )
        if config.privileged and (reasons := refusals(config.privileged, scorer.info)):
            raise TeacherMismatch(f"teacher {config.teacher.url}: " + "; ".join(reasons))
    except BaseException:
        scorer.close()
        raise
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_samples=rollout.samples_per_problem,
        top_ids=objective.top_k,
    )
    try:
        sampler = build_sampler(rollout, student, longest_prompt)
    except BaseException:
        scorer.close()
        raise
    return Opd(
        task,
        sampler,
        sampling,
        scorer,
        objective,
        problems_per_step=config.problems_per_step,
        seed=config.seed,
        num_steps=config.steps,
        checkpoint_every=config.checkpoint.every_steps,
        max_staleness=rollout.max_staleness,
    )


def build_sampler(config: RolloutConfig, student: Student, longest_prompt: int) -> Sampler:
    """In this process, or from the server at `config.url`; `longest_prompt` in tokens.

    Raises:
        TeacherMismatch, TeacherError: that server does not fit, or cannot be reached.
    """
    if config.url is None:
        return TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    return RemoteSampler(
        config.url,
        student,
        max_context_tokens=longest_prompt + config.max_new_tokens,
        timeout_s=config.timeout_s,
    )
