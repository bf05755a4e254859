"""GRPO and PPO as stages: what a step collects, how often it updates, and that reward rises."""

import dataclasses
import math

import pytest
import torch

from protos.records import Message
from student_trainer.alarms import SKIPPED
from student_trainer.collate import completion_logits
from student_trainer.config import ConfigError, parse_config
from student_trainer.learner import Learner
from student_trainer.losses import log_probs
from student_trainer.samples import sample_rows
from student_trainer.stages.actor import collate_written
from student_trainer.stages.build import build_stage
from student_trainer.stages.critic import Critic
from student_trainer.stages.ppo import token_rewards
from student_trainer.stages.watch import full_row
from student_trainer.student import load_backbone, load_student
from student_trainer.study.toy import ANSWER_MARK, build_toy_model
from student_trainer.tasks.problem import Problem, SplitTask

GROUP = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


def task_of(score) -> SplitTask:
    problems = [Problem(f"{n}", (Message("user", f"{n}+{n + 1}"),), "0") for n in range(40)]
    return SplitTask("marks", problems[:32], problems[32:], score, lambda *_: True)


MARKED = task_of(lambda _, text: float(ANSWER_MARK in text))
"""A reward that an untrained model gets now and then: whether the text holds the answer's mark."""

DIGIT = task_of(lambda _, text: float(text[:1].isdigit()))
"""A reward that an untrained model gets often."""

NEVER = task_of(lambda *_: 0.0)


def config_of(model, stage, **tables):
    return parse_config(
        {
            "run": "unused",
            "steps": 40,
            "problems_per_step": 8,
            "model": {"path": str(model)},
            "task": {"kind": "toy"},
            "stage": {"truncated": "punish", **stage},
            "rollout": {"max_new_tokens": 6, "samples_per_problem": GROUP, "temperature": 0.9},
            "optim": {"lr": 5e-3, "warmup_steps": 0},
        }
        | tables
    )


def built(config, task):
    student = load_student(config.model)
    return student, Learner.build(student, config), build_stage(config, student, task)


GRPO = {"kind": "grpo"}
PPO = {"kind": "ppo", "num_epochs": 2, "critic_lr": 1e-3}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("stage", [GRPO | {"num_minibatches": 2, "kl_coefficient": 0.01}, PPO], ids=["grpo", "ppo"])
def test_reward_rises(model, stage, seed):
    config = config_of(model, stage, seed=seed)
    _, learner, built_stage = built(config, MARKED)
    rewards = []
    for step in range(20):
        collected = built_stage.collect(step)
        rewards.append(sum(collected.rewards) / len(collected.rewards))
        learner.step(built_stage, collected)
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    # 320 texts each: a share's standard error is below .028, and chance alone does not raise it by six of them.
    assert last > first + 6 * 0.028, rewards


def test_a_step_without_a_difference_changes_nothing_and_says_so(model):
    config = config_of(model, GRPO | {"max_draws": 3})
    student, learner, stage = built(config, NEVER)
    before = {name: tensor.clone() for name, tensor in student.model.state_dict().items()}
    collected = stage.collect(0)
    row = learner.step(stage, collected)
    # Eight groups, and others in their place twice.
    assert collected.metrics["groups_dropped"] == 3 * 8
    assert collected.metrics["draws"] == 3
    assert collected.metrics["sampled_tokens"] == sum(len(r.completion_ids) for r in collected.rollouts) > 0
    assert row == {"num_tokens": 0, "lr": 5e-3, "num_updates": 0, "skipped_steps": 0, "watch_s": 0}
    logged = sample_rows(1, collected, collected.rewards, 2, student.tokenizer)
    assert [line["text"] for line in logged] == [rollout.text for rollout in collected.rollouts[:2]]
    assert all(tensor.equal(before[name]) for name, tensor in student.model.state_dict().items())


def test_equal_groups_are_dropped_and_the_others_keep_their_advantages(model):
    """Reward 1 for every text that starts with a digit and ends: equal in some of the groups."""
    config = config_of(model, GRPO | {"max_draws": 1}, rollout={"max_new_tokens": 6, "samples_per_problem": 2})
    _, _, stage = built(config, DIGIT)
    collected = stage.collect(0)
    pairs = list(zip(collected.rollouts[::2], collected.rollouts[1::2], strict=True))
    rewards = [tuple(float(r.text[:1].isdigit() and r.is_finished) for r in pair) for pair in pairs]
    different = [reward for reward in rewards if reward[0] != reward[1]]
    assert 0 < len(different) < 8
    assert collected.metrics["groups_dropped"] == 8 - len(different)
    assert collected.batch.advantage_BT is not None
    # Rewards 0 and 1: mean 1/2, deviation 1 / sqrt 2.
    size = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = [size if reward else -size for pair in different for reward in pair]
    assert collected.batch.advantage_BT[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    kept = config_of(model, GRPO | {"drop_equal_groups": False}, rollout=config.rollout.model_dump())
    assert built(kept, DIGIT)[2].collect(0).batch.num_sequences == 16


def test_further_problems_take_the_place_of_equal_groups_until_the_batch_is_full(model):
    """Of a step's eight problems the first draw is the same as without; what comes after is drawn anew, repeatably."""
    rollout = {"max_new_tokens": 6, "samples_per_problem": 2}

    def collected(max_draws):
        return built(config_of(model, GRPO | {"max_draws": max_draws}, rollout=rollout), DIGIT)[2].collect(0)

    def ids_of(step):
        return [rollout.completion_ids.tolist() for rollout in step.rollouts]

    alone, full, again = collected(1), collected(100), collected(100)
    assert alone.batch.num_sequences < full.batch.num_sequences == 8 * 2
    num_groups = len(full.rollouts) // 2
    assert full.metrics["groups_dropped"] == num_groups - 8 > 0
    assert 1 < full.metrics["draws"] < 100
    assert ids_of(full)[:16] == ids_of(alone)
    assert ids_of(full) == ids_of(again)
    assert len(full.rewards) == len(full.rollouts)
    assert full.metrics["sampled_tokens"] == sum(map(len, ids_of(full)))
    twice = collected(2)
    # As many as were dropped of the first eight, no more.
    assert len(twice.rollouts) // 2 == 8 + alone.metrics["groups_dropped"]
    assert ids_of(full)[: len(twice.rollouts)] == ids_of(twice)


def test_a_cut_completion_is_left_out_or_punished(model):
    always = task_of(lambda *_: 1.0)
    for kind, own in (("grpo", {"max_draws": 1}), ("ppo", {})):
        masked, punished = (
            built(config_of(model, {"kind": kind, "truncated": choice, **own}), always)[2].collect(0)
            for choice in ("mask", "punish")
        )
        finished = [rollout.is_finished for rollout in masked.rollouts]
        num_cut = len(finished) - sum(finished)
        assert 0 < num_cut < len(finished)
        assert masked.metrics["rollouts_masked"] == num_cut
        assert punished.metrics["rollouts_masked"] == 0
        assert masked.rewards == punished.rewards == [1.0] * len(finished)
        if kind == "grpo":
            # With reward 1 for all, a group differs only where a cut one was given 0.
            assert masked.batch.num_sequences == 0
            assert punished.batch.advantage_BT is not None
            last = [a[m][-1] for a, m in zip(punished.batch.advantage_BT, punished.batch.mask_BT, strict=True)]
            assert {float(a) > 0 for a in last} == {True, False}
        else:
            assert masked.batch.num_sequences == sum(finished)
            assert punished.batch.num_sequences == len(finished)


def test_the_old_log_probs_are_those_of_the_weights_and_the_ratio_starts_at_one(model):
    config = config_of(model, GRPO | {"kl_coefficient": 0.5})
    student, _, stage = built(config, DIGIT)
    batch = stage.collect(0).batch
    logits_BTV = completion_logits(student.model, batch)
    logp_BTV = log_probs(logits_BTV, 0.9)
    logp_BT = logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0]
    assert batch.sampled_logp_BT is not None
    assert batch.reference_logp_BT is not None
    for known in (batch.sampled_logp_BT, batch.reference_logp_BT):
        torch.testing.assert_close(known[batch.mask_BT], logp_BT[batch.mask_BT], atol=1e-5, rtol=0)
    # So the loss is -A and the divergence 0.
    assert batch.advantage_BT is not None
    loss_BT = stage.loss(logits_BTV, batch)
    torch.testing.assert_close(loss_BT[batch.mask_BT], -batch.advantage_BT[batch.mask_BT], atol=1e-4, rtol=0)
    watched = stage.watch(logits_BTV, batch)
    assert watched["clip_fraction"] == 0
    assert abs(watched["sampler_kl"]) < 1e-6


def test_a_step_has_an_update_for_each_minibatch_of_each_epoch(model):
    config = config_of(model, GRPO | {"num_minibatches": 3, "num_epochs": 2, "drop_equal_groups": False})
    _, learner, stage = built(config, DIGIT)
    collected = stage.collect(0)
    sizes = [batch.num_sequences for batch in collected.updates()]
    assert sizes == [22, 22, 20, 22, 22, 20]
    row = learner.step(stage, collected)
    assert row["num_updates"] == 6
    steps = {int(state["step"]) for state in learner.optimizer.state.values()}
    assert steps == {6}
    assert row["clip_fraction"] > 0


def test_the_reward_is_at_the_last_token_and_the_penalty_at_each(model):
    config = config_of(model, PPO | {"kl_coefficient": 0.1})
    _, _, stage = built(config, MARKED)
    rollouts = stage.collect(0).rollouts[:2]
    batch = collate_written(rollouts)
    assert batch.sampled_logp_BT is not None
    batch = dataclasses.replace(batch, reference_logp_BT=batch.sampled_logp_BT - 2)
    rewards = token_rewards(batch, torch.tensor([1.0, 3.0]), 0.1)
    for row, rollout, reward in zip(rewards, rollouts, (1.0, 3.0), strict=True):
        length = len(rollout.completion_ids)
        # log p - log p_ref = 2, so the penalty is 0.2 a token.
        assert row.tolist() == pytest.approx([-0.2] * (length - 1) + [reward - 0.2] + [0.0] * (len(row) - length))


def test_the_critic_learns_what_to_expect(model):
    """Reward 1 for all: from 0, its values come close to 1, and its loss to 0."""
    config = config_of(model, PPO | {"critic_lr": 1e-2, "truncated": "mask"})
    _, _, stage = built(config, task_of(lambda *_: 1.0))
    rows = [stage.collect(step).metrics for step in range(12)]
    assert rows[0]["value_mean"] == 0
    assert rows[-1]["value_loss"] < 0.2 * rows[0]["value_loss"]


def test_a_critic_s_update_that_is_not_finite_is_skipped_and_leaves_the_critic_as_it_was(model):
    """The first of two minibatches is poisoned; beside a critic that was given the second one alone."""
    config = config_of(model, PPO)
    _, _, stage = built(config, DIGIT)
    batch = collate_written(stage.collect(0).rollouts[:6])
    states = []
    for poison in (0.0, math.nan, math.inf):
        critic = Critic(load_backbone(config.model), config.optim, clip=0.2)
        value_BT = critic.values(batch)
        return_BT = value_BT + 1
        return_BT[0] += poison
        target = dataclasses.replace(batch, old_value_BT=value_BT, return_BT=return_BT)
        fit = critic.fit(target.shares(2) if poison else target.shares(2)[1:], num_epochs=1)
        assert fit.num_skipped == (1 if poison else 0)
        assert math.isfinite(fit.loss) == (not poison)
        state = critic.state_dict()
        moments = [value for one in state["optimizer"]["state"].values() for value in one.values()]
        states.append([*state["model"].values(), *moments])
    for other in states[1:]:
        assert all(left.equal(right) for left, right in zip(states[0], other, strict=True))


def test_a_critic_s_skipped_updates_count_with_the_student_s(model):
    """A reward that is no number: both updates of both are skipped, on top of five before."""
    config = config_of(model, PPO)
    _, learner, stage = built(config, task_of(lambda *_: math.nan))
    collected = stage.collect(0)
    assert collected.metrics[SKIPPED] == 2
    row = full_row(1, collected.metrics, {"watch_s": 0.0}, learner.step(stage, collected), {SKIPPED: 5})
    assert row[SKIPPED] == 5 + 2 + 2


def test_grpo_needs_a_group(model):
    with pytest.raises(ConfigError, match=r"rollout\.samples_per_problem is 1: set it to 2 or more, for example 8"):
        config_of(model, GRPO, rollout={"samples_per_problem": 1})
