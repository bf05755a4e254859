"""What is watched while a student learns: pure functions of arrays and texts, every mean taken per response token.

Shape letters as in student_trainer.losses, and D deciles of a response. Functions of log-probs give one value a token,
[B, T], so that tokens may come in any pieces; `token_means` turns them into metrics. Logs are natural, entropies and
divergences in nats. A NaN on a response token makes its metric NaN: nothing is filled in.
"""

from student_trainer.monitor.distribution import (
    NUM_DECILES,
    deciles,
    entropy,
    mass_of,
    sampled_reverse_kl,
)
from student_trainer.monitor.reduce import token_means
from student_trainer.monitor.support import (
    Bias,
    Overlap,
    SupportMass,
    bias,
    bias_ratio,
    outside_square_mass,
    overlap,
    support_mass,
    unnormalised_loss,
)
from student_trainer.monitor.text import Counts, Lengths, count, hedge_frequency, lengths, repeat_ratio, zlib_ratio

__all__ = [
    "NUM_DECILES",
    "Bias",
    "Counts",
    "Lengths",
    "Overlap",
    "SupportMass",
    "bias",
    "bias_ratio",
    "count",
    "deciles",
    "entropy",
    "hedge_frequency",
    "lengths",
    "mass_of",
    "outside_square_mass",
    "overlap",
    "repeat_ratio",
    "sampled_reverse_kl",
    "support_mass",
    "token_means",
    "unnormalised_loss",
    "zlib_ratio",
]
