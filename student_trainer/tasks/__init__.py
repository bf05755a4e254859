"""Tasks: what to train on, what to measure on, and how an answer is checked."""

from student_trainer.tasks.build import build_task
from student_trainer.tasks.config import DatasetTask, JsonlTask, ReasoningGymTask, TaskConfig, ToyTask
from student_trainer.tasks.problem import Problem, SplitTask, Task

__all__ = [
    "DatasetTask",
    "JsonlTask",
    "Problem",
    "ReasoningGymTask",
    "SplitTask",
    "Task",
    "TaskConfig",
    "ToyTask",
    "build_task",
]
