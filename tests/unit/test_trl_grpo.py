"""Our policy loss against TRL's own, on the same tensors: TRL 1.16.0, trl/trainer/grpo_trainer.py, `_compute_loss`.

A real `GRPOTrainer` is built over a toy model, so that TRL itself derives its settings from its config; only where its
log-probs come from is replaced, by the tensors of the test. TRL's loss is called as its training step calls it. The KL
term is that of GRPO's paper; TRL's default multiplies it by the ratio (`use_bias_correction_kl`).
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer.losses import token_mean
from student_trainer.losses.policy import clipped_surrogate, group_advantages, reference_kl
from student_trainer.study.toy import build_toy_model

with warnings.catch_warnings():
    # TRL names the newest vLLM it was tested with; nothing here starts vLLM.
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

P, G, T = 2, 4, 6
BUDGET = 10


class GivenLogProbs(GRPOTrainer):
    """TRL's trainer over given log-probs of the completion tokens."""

    given_logp_BT: torch.Tensor

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.given_logp_BT, torch.zeros_like(self.given_logp_BT), None


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_toy_model(tmp_path_factory.mktemp("toy"), hidden_size=32, num_layers=1)


def trl_trainer(model, folder, **settings) -> GivenLogProbs:
    args = GRPOConfig(
        output_dir=str(folder),
        report_to=[],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=P * G,
        num_generations=G,
        max_completion_length=BUDGET,
        use_bias_correction_kl=False,
        **settings,
    )
    trainer = GivenLogProbs(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "1+2"}] * P),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    assert trainer.model is not None
    trainer.model.train()
    # Set by transformers' training loop: one micro-batch an update.
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.fixture(scope="module")
def tensors() -> SimpleNamespace:
    """Sequences of unlike lengths, and ratios on both sides of every clip."""
    generator = torch.Generator().manual_seed(0)
    old, noise, reference = torch.randn(3, P * G, T, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 3, 5, 2, 6, 4, 1])
    reward_PG = torch.rand(P, G, generator=generator, dtype=torch.float64)
    return SimpleNamespace(
        logp=old + 0.4 * noise,
        old=old,
        reference=old + 0.5 * reference,
        mask=torch.arange(T)[None] < lengths[:, None],
        lengths=lengths,
        advantage=group_advantages(reward_PG).flatten(),
    )


def ours(tensors, logp, *, clip_low, clip_high, kl_coefficient) -> torch.Tensor:
    advantage_BT = tensors.advantage[:, None].expand(-1, T)
    loss_BT = clipped_surrogate(logp, tensors.old, advantage_BT, tensors.mask, clip_low=clip_low, clip_high=clip_high)
    return loss_BT + kl_coefficient * reference_kl(logp, tensors.reference, tensors.mask)


def theirs(trainer, tensors, logp) -> torch.Tensor:
    trainer.given_logp_BT = logp
    ids = torch.zeros(P * G, T, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": tensors.mask.long(),
        "advantages": tensors.advantage,
        "old_per_token_logps": tensors.old,
        "ref_per_token_logps": tensors.reference,
        "num_items_in_batch": tensors.mask.sum(),
    }
    return trainer._compute_loss(trainer.model, inputs)


def mean_of(loss_type: str, loss_BT: torch.Tensor, tensors) -> torch.Tensor:
    """Each of TRL's denominators over our loss of a token; ours is "dapo", and "bnpo" in one micro-batch."""
    match loss_type:
        case "dapo" | "bnpo":
            return token_mean(loss_BT, tensors.mask)
        case "grpo":
            return (loss_BT.sum(-1) / tensors.lengths).mean()
        case _:
            return loss_BT.sum() / (P * G * BUDGET)


@pytest.mark.parametrize("kl_coefficient", [0.0, 0.1])
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo"])
def test_the_loss_and_its_gradient_are_trls(model, tmp_path, tensors, loss_type, clip_high, kl_coefficient):
    trainer = trl_trainer(
        model, tmp_path, loss_type=loss_type, epsilon=0.2, epsilon_high=clip_high, beta=kl_coefficient
    )
    pair = [tensors.logp.clone().requires_grad_() for _ in range(2)]
    loss_BT = ours(tensors, pair[0], clip_low=0.2, clip_high=clip_high, kl_coefficient=kl_coefficient)
    losses = mean_of(loss_type, loss_BT, tensors), theirs(trainer, tensors, pair[1])
    assert abs(float(losses[0].detach())) > 1e-3
    torch.testing.assert_close(*losses, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(loss, logp)[0] for loss, logp in zip(losses, pair, strict=True)]
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_the_tensors_reach_every_region_of_the_clip(tensors):
    """Otherwise the agreement above would say nothing of it."""
    ratio = (tensors.logp - tensors.old).exp()[tensors.mask]
    advantage = tensors.advantage[:, None].expand(-1, T)[tensors.mask]
    for sign in (1, -1):
        counted = ratio[advantage * sign > 0]
        assert (counted < 0.8).any()
        assert ((counted > 0.8) & (counted < 1.2)).any()
        assert (counted > 1.28).any()
