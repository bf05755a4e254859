"""What distillation descends."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from student_trainer.config.base import Section


class LossConfig(Section):
    """What is descended."""

    kind: Literal["stop_gradient_reverse_kl", "reverse_kl", "forward_kl"] = "stop_gradient_reverse_kl"
    """`reverse_kl` and `forward_kl` ask the teacher for its whole vocabulary: for small vocabularies."""
    support: Literal["student", "teacher", "union"] = "student"
    """Whose most likely ids a truncated loss runs over; full-vocabulary losses ignore it."""
    top_k: PositiveInt = 20
    """K of the support; a vocabulary smaller than K is taken whole."""
