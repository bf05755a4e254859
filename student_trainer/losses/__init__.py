"""Distillation losses: pure functions of tensors, one module a family; they know no config, no model and no wire.

Shape letters: B sequences, T completion tokens, V vocabulary, K a top-K list, S the support of a truncated loss.
One position: p is the student, q the teacher, r = log p - log q. Logs are natural, values are in nats.

    logp_BTV = log_probs(logits_BTV, temperature)
    support = union_support(student_top_ids_BTK, teacher_top_ids_BTK)
    teacher_logp_BTS = align(support, candidate_ids_BTM, candidate_logp_BTM, teacher_top_ids_BTK, teacher_top_logp_BTK)
    loss_BT = stop_gradient_reverse_kl(gather(logp_BTV, support), teacher_logp_BTS, support.mask_BTS)
    token_mean(loss_BT, mask_BT, num_tokens).backward()
"""

from student_trainer.losses.divergence import forward_kl, jsd, reverse_kl
from student_trainer.losses.logits import log_probs
from student_trainer.losses.reduce import token_mean
from student_trainer.losses.sampled import importance_weights, k2, k3, policy_gradient
from student_trainer.losses.support import (
    Support,
    align,
    full_vocabulary,
    gather,
    intersection_support,
    log_tail,
    student_support,
    teacher_support,
    union_support,
)
from student_trainer.losses.truncated import (
    biased_reverse_kl,
    renormalised_forward_kl,
    renormalised_reverse_kl,
    stop_gradient_reverse_kl,
    tail_forward_kl,
    tail_reverse_kl,
)

__all__ = [
    "Support",
    "align",
    "biased_reverse_kl",
    "forward_kl",
    "full_vocabulary",
    "gather",
    "importance_weights",
    "intersection_support",
    "jsd",
    "k2",
    "k3",
    "log_probs",
    "log_tail",
    "policy_gradient",
    "renormalised_forward_kl",
    "renormalised_reverse_kl",
    "reverse_kl",
    "stop_gradient_reverse_kl",
    "student_support",
    "tail_forward_kl",
    "tail_reverse_kl",
    "teacher_support",
    "token_mean",
    "union_support",
]
