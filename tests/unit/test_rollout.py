import copy
import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from protos.records import Message
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.transformers import TransformersSampler
from student_trainer.study.toy import VOCABULARY, build_toy_model, toy_tokenizer
from student_trainer.tasks import Problem

EOS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # An untrained model is nearly uniform: give it an output layer of its own, so that a wrong row would show.
    weight = torch.randn(model.config.vocab_size, 64, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(0.2 * weight)
    model.tokenizer = AutoTokenizer.from_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def sampler(model):
    return TransformersSampler(model, model.tokenizer, eos_token_ids=(EOS,))


PROBLEMS = [Problem(f"p{i}", (Message("user", text),), "0") for i, text in enumerate(["3+5", "1+2+3+4", "9+9+9"])]
SEEDS = [11, 12, 13]


def ids_of(rollouts):
    return [rollout.completion_ids.tolist() for rollout in rollouts]


def plain_logits(model, rollout):
    """Rows N - 1 .. N + T - 2 of a forward pass over one unpadded sequence."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_log_probs_are_those_of_a_plain_forward_at_the_temperature(model, sampler, temperature):
    params = SamplingParams(max_new_tokens=12, temperature=temperature, num_samples=2, top_ids=5)
    rollouts = sampler.sample(PROBLEMS, params, seeds=SEEDS)
    assert [rollout.problem.id for rollout in rollouts] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    for rollout in rollouts:
        logits_TV = plain_logits(model, rollout)
        logp_TV = (logits_TV / temperature).log_softmax(-1)
        ids = torch.from_numpy(rollout.completion_ids.astype(np.int64))
        np.testing.assert_allclose(rollout.logprobs, logp_TV.gather(-1, ids[:, None])[:, 0], atol=1e-4)
        gaps = logits_TV.sort(-1, descending=True).values[:, :6].diff(dim=-1).abs().min()
        if gaps > 1e-4:
            assert rollout.top_ids.tolist() == logits_TV.topk(5).indices.tolist()


def test_a_completion_ends_with_eos_or_at_the_budget(sampler):
    params = SamplingParams(max_new_tokens=30, num_samples=8)
    rollouts = sampler.sample(PROBLEMS, params, seeds=SEEDS)
    assert {rollout.is_finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert EOS not in rollout.completion_ids[:-1]
        assert rollout.is_finished == (rollout.completion_ids[-1] == EOS)
        assert rollout.is_finished or len(rollout.completion_ids) == 30


def test_greedy_equals_the_argmax_of_each_row_alone(model, sampler):
    for rollout in sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=10, temperature=0.0), seeds=SEEDS):
        assert rollout.completion_ids.tolist() == plain_logits(model, rollout).argmax(-1).tolist()


def test_a_completion_depends_on_its_own_seed_and_sample_alone(sampler):
    """In a batch, alone, in another order, and in a group of another size."""
    params = SamplingParams(max_new_tokens=20, num_samples=3)
    written = ids_of(sampler.sample(PROBLEMS, params, seeds=SEEDS))
    assert len({tuple(ids) for ids in written}) > 6  # some end at once, and so are equal by chance
    assert ids_of(sampler.sample(PROBLEMS[1:2], params, seeds=SEEDS[1:2])) == written[3:6]
    assert ids_of(sampler.sample(PROBLEMS[::-1], params, seeds=SEEDS[::-1])) == written[6:] + written[3:6] + written[:3]
    assert ids_of(sampler.sample(PROBLEMS, dataclasses.replace(params, num_samples=1), seeds=SEEDS)) == written[::3]
    other = ids_of(sampler.sample(PROBLEMS, params, seeds=[SEEDS[0], 99, SEEDS[2]]))
    assert [a == b for a, b in zip(written, other, strict=True)] == [True] * 3 + [False] * 3 + [True] * 3


def test_a_larger_budget_goes_on_where_the_smaller_one_stopped(sampler):
    short, long = (
        ids_of(sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=budget), seeds=SEEDS)) for budget in (5, 20)
    )
    assert [ids[:5] for ids in long] == short


def test_what_has_ended_is_handed_over_and_costs_nothing_more(model, sampler):
    fed, parts = [], []
    hook = model.register_forward_pre_hook(lambda _, args, named: fed.append(len(named["input_ids"])), with_kwargs=True)
    params = SamplingParams(max_new_tokens=30, num_samples=8)
    try:
        for ended in sampler.stream(PROBLEMS, params, seeds=SEEDS):
            parts.append(ended)
            assert max(len(rollout.completion_ids) for rollout in ended.values()) == len(fed)
    finally:
        hook.remove()
    written = {place: rollout for ended in parts for place, rollout in ended.items()}
    assert sum(map(len, parts)) == len(written) == 24
    # An eighth of the batch at a time; the last part is what is left.
    assert len(parts) > 3
    assert all(len(ended) >= 3 for ended in parts[:-1])
    # One row of a forward for each token: its prediction.
    assert sum(fed) == sum(len(rollout.completion_ids) for rollout in written.values())
    assert ids_of(written[place] for place in range(24)) == ids_of(sampler.sample(PROBLEMS, params, seeds=SEEDS))


def test_rows_that_leave_take_nothing_from_those_that_stay():
    """Log-probs of Gemma, some of whose layers keep a window of 4 tokens, after others have left its cache."""
    tokenizer = toy_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    sampler = TransformersSampler(model, tokenizer, eos_token_ids=(EOS, 5, 7, 9))  # so that some end early, some late
    rollouts = sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=20, num_samples=4), seeds=SEEDS)
    assert len({len(rollout.completion_ids) for rollout in rollouts}) > 3
    for rollout in rollouts:
        logp_TV = plain_logits(model, rollout).log_softmax(-1)
        ids = torch.from_numpy(rollout.completion_ids.astype(np.int64))
        np.testing.assert_allclose(rollout.logprobs, logp_TV.gather(-1, ids[:, None])[:, 0], atol=1e-4)


def test_logits_that_are_not_finite_are_an_error(model):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5, 0] = torch.nan
    sampler = TransformersSampler(broken, model.tokenizer, eos_token_ids=(EOS,))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=3), seeds=SEEDS)


def test_sampling_leaves_the_global_random_state_and_the_mode_alone(model, sampler):
    model.train()
    before = torch.random.get_rng_state()
    sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=3), seeds=SEEDS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
