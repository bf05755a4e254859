"""Stages: who samples, who teaches, which loss. Each is a small class over the one loop."""

from student_trainer.stages.base import Collected, Stage
from student_trainer.stages.build import build_stage

__all__ = ["Collected", "Stage", "build_stage"]
