"""From a run's config to its stage."""

from __future__ import annotations

from protos.credentials import Tls
from student_trainer.config import GrpoStage, OpdStage, OpsdStage, PolicyStage, PpoStage, SftStage, TrainConfig
from student_trainer.privileged import privileged_of
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.scoring import Scorer
from student_trainer.stages.actor import Actor
from student_trainer.stages.base import Stage
from student_trainer.stages.critic import Critic
from student_trainer.stages.grpo import Grpo
from student_trainer.stages.objective import Objective
from student_trainer.stages.opd import Opd
from student_trainer.stages.ppo import Ppo
from student_trainer.stages.sft import Sft
from student_trainer.stages.surrogate import Reference, Surrogate
from student_trainer.student import Student, load_backbone, load_student
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
        case GrpoStage():
            stage, reference = config.stage, _build_reference(config, config.stage)
            surrogate = _build_surrogate(stage, config.rollout.temperature, kl_coefficient=stage.kl_coefficient)
            actor = _build_actor(config, stage, student, task)
            return Grpo(stage, actor, surrogate, reference, group_size=config.rollout.samples_per_problem)
        case PpoStage():
            stage, reference = config.stage, _build_reference(config, config.stage)
            # The penalty is in the rewards, not in the loss.
            surrogate = _build_surrogate(stage, config.rollout.temperature, kl_coefficient=0.0)
            optim = config.optim.model_copy(update={"lr": stage.critic_lr})
            critic = Critic(load_backbone(config.model), optim, clip=stage.value_clip)
            return Ppo(stage, _build_actor(config, stage, student, task), surrogate, critic, reference)


def _build_opd(config: TrainConfig, stage: OpdStage | OpsdStage, student: Student, task: Task) -> Opd:
    assert config.teacher is not None
    rollout = config.rollout
    objective = Objective(stage.loss, student.vocab_size, rollout.temperature)
    longest_prompt = max(len(render_prompt(student.tokenizer, problem.messages)) for problem in task.train)
    scorer = Scorer(
        config.teacher.url,
        temperature=rollout.temperature,
        timeout_s=config.teacher.timeout_s,
        tls=Tls(ca=config.teacher.ca) if config.teacher.ca else None,
        privileged=privileged_of(stage.privileged) if stage.privileged else None,
    )
    try:
        scorer.handshake(
            student.fingerprint,
            objective.wanted,
            longest_prompt + rollout.max_new_tokens,
            tokenizer=student.tokenizer,
        )
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
    return Opd(task, sampler, sampling, scorer, objective, problems_per_step=config.problems_per_step, seed=config.seed)


def _build_actor(config: TrainConfig, stage: PolicyStage, student: Student, task: Task) -> Actor:
    rollout = config.rollout
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        num_samples=rollout.samples_per_problem,
    )
    sampler = TransformersSampler(student.model, student.tokenizer, eos_token_ids=student.eos_token_ids)
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
