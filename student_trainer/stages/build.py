"""From a run's config to its stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from protos.credentials import Tls
from student_trainer import distributed
from student_trainer.config import (
    GrpoStage,
    OpdStage,
    OpsdStage,
    PolicyStage,
    PpoStage,
    RolloutConfig,
    SftStage,
    TrainConfig,
)
from student_trainer.config.teacher import WeightsBy
from student_trainer.privileged import num_context_tokens, privileged_of, refusals
from student_trainer.rollout.base import Sampler, SamplingParams
from student_trainer.rollout.remote import RemoteSampler
from student_trainer.rollout.teacher import TeacherSampler
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.scoring import Scorer
from student_trainer.sequence_logp import sequence_logp
from student_trainer.stages.actor import Actor
from student_trainer.stages.base import Stage
from student_trainer.stages.critic import Critic
from student_trainer.stages.grpo import Grpo
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import FullVocabulary, Opd
from student_trainer.stages.opsd import DEFAULT_DECAY, Opsd, RunningMean
from student_trainer.stages.ppo import Ppo
from student_trainer.stages.sft import Sft
from student_trainer.stages.surrogate import Reference, Surrogate
from student_trainer.student import Student, load_backbone, load_student
from student_trainer.tasks import Task
from student_trainer.teacher_identity import TEACHER_FILE, TeacherIdentity, TeacherMismatch
from student_trainer.text import render_prompt
from student_trainer.traces import teacher_traces
from student_trainer.weights_sync import Carry, stream
from student_trainer.weights_transfer import check_takes_transfers, transfer


def build_stage(config: TrainConfig, student: Student, task: Task, *, quiet: bool = False) -> Stage:
    """The stage that `config` describes; one that has a teacher has shaken hands with it, or has its traces.

    Args:
        quiet: whether nothing is said of how far the teacher's traces are.

    Raises:
        TeacherMismatch: the teacher cannot score this student.
        TeacherError: the teacher cannot be reached.
    """
    match config.stage:
        case SftStage():
            traces = config.stage.traces
            problems = task.train
            if traces:
                problems = distributed.by_main(lambda: teacher_traces(config, traces, task, quiet=quiet))
            return Sft(
                student,
                problems,
                problems_per_step=config.problems_per_step,
                seed=config.seed,
                packing=config.stage.packing,
            )
        case OpdStage() | OpsdStage():
            return _build_opd(config, config.stage, student, task)
        case GrpoStage():
            stage, reference = config.stage, _build_reference(config, config.stage)
            surrogate = _build_surrogate(stage, config.rollout.temperature, kl_coefficient=stage.kl_coefficient)
            actor = _build_actor(config, stage, student, task)
            return Grpo(stage, actor, surrogate, reference, group_size=config.num_samples)
        case PpoStage():
            stage, reference = config.stage, _build_reference(config, config.stage)
            # The penalty is in the rewards, not in the loss.
            surrogate = _build_surrogate(stage, config.rollout.temperature, kl_coefficient=0.0)
            optim = config.optim.model_copy(update={"lr": stage.critic_lr})
            critic = Critic(load_backbone(config.model), optim, clip=stage.value_clip)
            return Ppo(stage, _build_actor(config, stage, student, task), surrogate, critic, reference)


def _build_opd(config: TrainConfig, stage: OpdStage | OpsdStage, student: Student, task: Task) -> Opd | Opsd:
    assert config.teacher is not None
    rollout = config.rollout
    objective = Objective(stage.loss, student.vocab_size, rollout.temperature, eos_token_ids=student.eos_token_ids)
    full = FullVocabulary(config.watch.full_vocabulary_every, config.watch.full_vocabulary_rollouts, student.vocab_size)
    told = privileged_of(config.privileged) if config.privileged else None
    longest_prompt = longest_context = _longest_prompt(student, task)
    if told is not None:
        # A problem without what the teacher is to be told is found now, too, not at its step.
        longest_context = max(num_context_tokens(student.tokenizer, problem, told(problem)) for problem in task.train)
    scorer = Scorer(
        config.teacher.url,
        temperature=rollout.temperature,
        timeout_s=config.teacher.timeout_s,
        max_wait_s=config.teacher.max_wait_s,
        tls=Tls(ca=config.teacher.ca) if config.teacher.ca else None,
        name=config.teacher.name,
        privileged=told,
        carry=_carry(config.teacher.weights_by),
    )
    try:
        scorer.handshake(
            student.fingerprint,
            replace(objective.wanted, vocab_size=student.vocab_size) if full.every_steps else objective.wanted,
            longest_context + rollout.max_new_tokens,
            tokenizer=student.tokenizer,
        )
        if config.privileged and (reasons := refusals(config.privileged, scorer.info)):
            raise TeacherMismatch(f"teacher {config.teacher.url}: " + "; ".join(reasons))
        identity = TeacherIdentity.of(scorer.info)
        is_sent = isinstance(stage, OpsdStage) and stage.teacher != "frozen"
        if is_sent and config.teacher.weights_by == "transfer":
            check_takes_transfers(scorer.info, config.teacher.url, "teacher")
        (replace(identity, weights_version=None) if is_sent else identity).hold(Path(config.run) / TEACHER_FILE)
    except BaseException:
        scorer.close()
        raise
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_samples=config.num_samples,
        top_ids=objective.top_k,
    )
    try:
        sampler = build_sampler(rollout, student, longest_prompt)
    except BaseException:
        scorer.close()
        raise
    opd = Opd(
        task,
        sampler,
        sampling,
        scorer,
        objective,
        full,
        problems_per_step=config.problems_per_step,
        seed=config.seed,
        num_steps=config.steps,
        checkpoint_every=config.checkpoint.every_steps,
        max_staleness=rollout.max_staleness,
        teacher_sampler=TeacherSampler(scorer, student, micro_batch_size=config.optim.micro_batch_size),
        teacher_written=stage.teacher_written,
        current_logp=partial(
            sequence_logp,
            student.model,
            temperature=rollout.temperature,
            micro_batch_size=config.optim.micro_batch_size,
        ),
    )
    if not isinstance(stage, OpsdStage) or stage.teacher == "frozen":
        return opd
    mean = RunningMean(stage.ema_decay or DEFAULT_DECAY) if stage.teacher == "ema" else None
    return Opsd(opd, scorer, student, mean)


def build_sampler(config: RolloutConfig, student: Student, longest_prompt: int) -> Sampler:
    """In this process, or from the server at `config.url`; `longest_prompt` in tokens.

    Raises:
        TeacherMismatch, TeacherError: that server does not fit, or cannot be reached.
        ConfigError: it takes no weights by transfer.
    """
    if config.url is None:
        return TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
    sampler = RemoteSampler(
        config.url,
        student,
        max_context_tokens=longest_prompt + config.max_new_tokens,
        timeout_s=config.timeout_s,
        carry=_carry(config.weights_by),
    )
    if config.weights_by == "transfer":
        try:
            check_takes_transfers(sampler.info, config.url, "rollout")
        except BaseException:
            sampler.close()
            raise
    return sampler


def _carry(by: WeightsBy) -> Carry:
    return transfer if by == "transfer" else stream


def _build_actor(config: TrainConfig, stage: PolicyStage, student: Student, task: Task) -> Actor:
    rollout = config.rollout
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_samples=config.num_samples,
    )
    sampler = build_sampler(rollout, student, _longest_prompt(student, task))
    return Actor(
        task,
        sampler,
        sampling,
        truncated=stage.truncated,
        problems_per_step=config.problems_per_step,
        seed=config.seed,
    )


def _build_surrogate(stage: PolicyStage, temperature: float, *, kl_coefficient: float) -> Surrogate:
    return Surrogate(
        clip_low=stage.clip_low, clip_high=stage.clip_high, kl_coefficient=kl_coefficient, temperature=temperature
    )


def _build_reference(config: TrainConfig, stage: PolicyStage) -> Reference | None:
    """The model of step 0, loaded anew; None where nothing is to stay close to it."""
    if stage.kl_coefficient == 0:
        return None
    model = load_student(config.model).model
    return Reference(model, temperature=config.rollout.temperature, micro_batch_size=config.optim.micro_batch_size)


def _longest_prompt(student: Student, task: Task) -> int:
    """Tokens of the longest prompt that the student is trained on."""
    return max(len(render_prompt(student.tokenizer, problem.messages)) for problem in task.train)
