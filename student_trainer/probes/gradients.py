"""A loss's gradient against the one it stands for. Pure: tensors in, figures out.

Gradients are with respect to the student's logits, one vector of V at each token. A loss's self-gradient is the one
that it has where the teacher is the student: 0 for a loss that rests at the teacher. The unnormalised reverse KL over a
support S has grad P there, P = sum_S p, the +1 of its score form that does not cancel: descent drives mass out of S
whatever the teacher says, until P = Q / e (losses.biased_reverse_kl).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from student_trainer import losses, monitor
from student_trainer.collate import Batch
from student_trainer.config import LossConfig
from student_trainer.stages.objective import Objective

FORWARD = frozenset({"forward_kl", "tail_forward_kl", "renormalised_forward_kl", "k3"})
"""Kinds whose full-vocabulary counterpart is KL(q || p); jsd is its own, that of all others is KL(p || q)."""

ROUNDING = 1e-5
"""The largest self-gradient that is no more than rounding: a hundred times float32's, whose sums over a vocabulary are
off by about 1e-7."""


@dataclass(frozen=True)
class GradientSums:
    """Sums over the tokens of some rollouts; two of them add up.

    Attributes:
        dot: of the loss's and the reference's gradients.
        square, reference_square: of their norms.
        cosine: of the two at each token; 1 where both are 0.
        self_norm: the norm of the self-gradient at each token.
        pull_norm: the norm of gradient less self-gradient: what the teacher moves.
        student_mass, teacher_mass: P and Q on the support; of a loss without one, every token counts 1.
        eos_probability: the student's.
        num_tokens: how many tokens.
    """

    dot: float = 0.0
    square: float = 0.0
    reference_square: float = 0.0
    cosine: float = 0.0
    self_norm: float = 0.0
    pull_norm: float = 0.0
    student_mass: float = 0.0
    teacher_mass: float = 0.0
    eos_probability: float = 0.0
    num_tokens: int = 0

    def __add__(self, other: GradientSums) -> GradientSums:
        pairs = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return GradientSums(**pairs)

    def figures(self) -> dict[str, Any]:
        """Means over tokens, by name; `cosine` is of all tokens' gradients as one vector; 1 where both are 0."""
        norm, reference_norm = self.square**0.5, self.reference_square**0.5
        are_zero = max(norm, reference_norm) < ROUNDING
        means = {
            name: value / self.num_tokens
            for name, value in asdict(self).items()
            if name not in ("dot", "square", "reference_square", "cosine", "num_tokens")
        }
        return {
            "cosine": 1.0 if are_zero else self.dot / (norm * reference_norm or float("nan")),
            "cosine_per_token": self.cosine / self.num_tokens,
            "relative_norm": norm / (reference_norm or float("nan")),
            "bias_ratio": monitor.bias_ratio(self.self_norm, self.pull_norm),
            "mass_gap": means["student_mass"] - means["teacher_mass"],
            **means,
            "leaks": means["self_norm"] > ROUNDING,
        }


def reference_config(config: LossConfig, width: int, vocab_size: int) -> LossConfig:
    """The loss that `config` stands for: over the whole vocabulary, or over the widest lists with all else as one more
    outcome, where models give no more than `width` of the `vocab_size` log-probs.
    """
    if config.kind == "jsd":
        return config
    direction = "forward_kl" if config.kind in FORWARD else "reverse_kl"
    if width >= vocab_size:
        return LossConfig.model_validate({"kind": direction, "top_k": vocab_size})
    return LossConfig.model_validate({"kind": f"tail_{direction}", "support": "union", "top_k": width})


def compare(objective: Objective, reference: Objective, logits_BTV: Tensor, batch: Batch) -> GradientSums:
    """The sums of one batch, whose lists are as wide as `reference` needs; what the mask leaves out counts nothing."""
    gradient_BTV = logit_gradient(objective, logits_BTV, narrowed(batch, objective))
    reference_BTV = logit_gradient(reference, logits_BTV, narrowed(batch, reference))
    self_taught = taught_by_itself(logits_BTV, batch, reference.wanted.temperature or 1.0)
    self_BTV = logit_gradient(objective, logits_BTV, narrowed(self_taught, objective))
    watched = objective.watch(logits_BTV, narrowed(batch, objective))
    norm_BT, reference_norm_BT = gradient_BTV.norm(dim=-1), reference_BTV.norm(dim=-1)
    dot_BT, product_BT = (gradient_BTV * reference_BTV).sum(-1), norm_BT * reference_norm_BT
    are_zero_BT = (norm_BT < ROUNDING) & (reference_norm_BT < ROUNDING)
    cosine_BT = torch.where(are_zero_BT, 1.0, dot_BT / product_BT.clamp_min(torch.finfo(product_BT.dtype).tiny))
    return GradientSums(
        dot=float(dot_BT.sum()),
        square=float(norm_BT.square().sum()),
        reference_square=float(reference_norm_BT.square().sum()),
        cosine=float(cosine_BT[batch.mask_BT].sum()),
        self_norm=float(self_BTV.norm(dim=-1).sum()),
        pull_norm=float((gradient_BTV - self_BTV).norm(dim=-1).sum()),
        student_mass=watched.get("support_student_mass", 1.0) * batch.num_tokens,
        teacher_mass=watched.get("support_teacher_mass", 1.0) * batch.num_tokens,
        eos_probability=watched["eos_probability"] * batch.num_tokens,
        num_tokens=batch.num_tokens,
    )


def logit_gradient(objective: Objective, logits_BTV: Tensor, batch: Batch) -> Tensor:
    """The gradient of the sum of the loss over the tokens of the mask, [B, T, V]."""
    leaf_BTV = logits_BTV.detach().requires_grad_()
    loss_BT = objective.loss(leaf_BTV, batch)
    (gradient_BTV,) = torch.autograd.grad(torch.where(batch.mask_BT, loss_BT, 0.0).sum(), leaf_BTV)
    return gradient_BTV


def taught_by_itself(logits_BTV: Tensor, batch: Batch, temperature: float) -> Batch:
    """The batch with the student's own log-probs as the teacher's, lists as wide as they were."""
    assert batch.teacher_top_BTK is not None
    assert batch.student_top_BTK is not None
    logp_BTV = losses.log_probs(logits_BTV.detach(), temperature)
    top = logp_BTV.topk(batch.teacher_top_BTK.shape[-1])
    return replace(
        batch,
        teacher_logp_BT=logp_BTV.gather(-1, batch.completion_ids_BT[..., None])[..., 0],
        teacher_top_BTK=top.indices,
        teacher_top_logp_BTK=top.values,
        teacher_candidate_logp_BTM=logp_BTV.gather(-1, batch.student_top_BTK.clamp_min(0)),
    )


def narrowed(batch: Batch, objective: Objective) -> Batch:
    """The batch as `objective` would have asked for it, of one that holds more; the teacher's list stays."""
    assert batch.student_top_BTK is not None
    assert batch.teacher_top_BTK is not None
    assert batch.teacher_top_logp_BTK is not None
    assert batch.teacher_candidate_logp_BTM is not None
    if objective.wanted.vocab_size:
        candidate_logp_BTM = losses.full_vocabulary(batch.teacher_top_BTK, batch.teacher_top_logp_BTK, batch.mask_BT)
    else:
        candidate_logp_BTM = batch.teacher_candidate_logp_BTM[..., : objective.wanted.student_top_k]
    return replace(
        batch,
        student_top_BTK=batch.student_top_BTK[..., : objective.top_k],
        teacher_candidate_logp_BTM=candidate_logp_BTM,
    )


def total(sums: Sequence[Mapping[str, Any]]) -> GradientSums:
    """Of the raw rows' sums."""
    return sum((GradientSums(**one) for one in sums), GradientSums())
