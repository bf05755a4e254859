import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from protos.records import Message
from student_trainer.rollout.base import SamplingParams
from student_trainer.rollout.transformers import TransformersSampler, draw
from student_trainer.study.toy import build_toy_model
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


def plain_logits(model, rollout):
    """Rows N - 1 .. N + T - 2 of a forward pass over one unpadded sequence."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.completion_ids]).astype(np.int64))[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.3])
def test_log_probs_are_those_of_a_plain_forward_at_the_temperature(model, sampler, temperature):
    params = SamplingParams(max_new_tokens=12, temperature=temperature, num_samples=2, top_ids=5)
    rollouts = sampler.sample(PROBLEMS, params, seed=3)
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
    rollouts = sampler.sample(PROBLEMS, params, seed=0)
    assert {rollout.is_finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        assert EOS not in rollout.completion_ids[:-1]
        assert rollout.is_finished == (rollout.completion_ids[-1] == EOS)
        assert rollout.is_finished or len(rollout.completion_ids) == 30


def test_greedy_equals_the_argmax_of_each_row_alone(model, sampler):
    for rollout in sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=10, temperature=0.0), seed=0):
        assert rollout.completion_ids.tolist() == plain_logits(model, rollout).argmax(-1).tolist()


def test_equal_seeds_equal_rollouts(sampler):
    params = SamplingParams(max_new_tokens=20)
    texts = [[rollout.text for rollout in sampler.sample(PROBLEMS, params, seed=seed)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_sampling_leaves_the_global_random_state_and_the_mode_alone(model, sampler):
    model.train()
    before = torch.random.get_rng_state()
    sampler.sample(PROBLEMS, SamplingParams(max_new_tokens=3), seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training


def test_draw_follows_the_distribution():
    """40,000 draws of p = (.7, .2, .1): each share within 4 standard errors, sqrt(p (1 - p) / n) <= .0023."""
    logp = torch.tensor([0.7, 0.2, 0.1]).log().expand(40_000, 3)
    ids = draw(logp, SamplingParams(max_new_tokens=1), torch.Generator().manual_seed(0))
    shares = ids.bincount(minlength=3) / 40_000
    np.testing.assert_allclose(shares, [0.7, 0.2, 0.1], atol=4 * 0.0023)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Of (.5, .3, .15, .05) the nucleus of .6 is {0, 1}: .5 < .6 <= .8; renormalised (.625, .375)."""
    logp = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    ids = draw(logp, SamplingParams(max_new_tokens=1, top_p=0.6), torch.Generator().manual_seed(0))
    shares = ids.bincount(minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.625, 0.375, 0, 0], atol=4 * 0.0035)
    assert shares[2] == shares[3] == 0
