"""From a task's configuration to the task; a loader is imported only when it is used."""

from __future__ import annotations

from typing import assert_never

from student_trainer.tasks.config import DatasetTask, JsonlTask, ReasoningGymTask, ToyTask
from student_trainer.tasks.problem import Task


def build_task(config: JsonlTask | DatasetTask | ReasoningGymTask | ToyTask) -> Task:
    """The task that `config` describes.

    Raises:
        ValueError: the data is missing or wrong; the message names where.
    """
    match config:
        case JsonlTask():
            from student_trainer.tasks.jsonl import jsonl_task

            return jsonl_task(config)
        case DatasetTask():
            from student_trainer.tasks.dataset import dataset_task

            return dataset_task(config)
        case ReasoningGymTask():
            from student_trainer.tasks.gym import gym_task

            return gym_task(config)
        case ToyTask():
            from student_trainer.study.toy import toy_task

            return toy_task(config)
        case _:
            assert_never(config)
