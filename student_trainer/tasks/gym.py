"""Problems drawn by reasoning-gym's generators and checked by their own rules."""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

from protos.records import Message
from student_trainer.rewards import tagged_answer
from student_trainer.tasks.config import ReasoningGymTask
from student_trainer.tasks.problem import Problem, SplitTask, prompt_key

logger = logging.getLogger(__name__)

DRAWS_PER_PROBLEM = 10
"""Before a generator counts as used up."""


def gym_task(config: ReasoningGymTask) -> SplitTask:
    """Different problems on either side, from seeds that never meet.

    A generator makes item i of seed s from the number s + i, so item i of seed s is item i - 1 of seed s + 1. The
    held-out items come from the numbers seed .. seed + 10 * held_out_size - 1 and the train items from those after; a
    train item that repeats a held-out prompt all the same is passed over.

    An answer counts only between <answer> and </answer>: the generators' rules pay for any text that holds the answer.
    `Problem.answer` is empty for the few generators that check a property and name no answer.

    Raises:
        ValueError: the generator or a parameter is unknown, or it cannot make so many different problems.
    """
    held_out_draws = DRAWS_PER_PROBLEM * config.held_out_size
    train_draws = DRAWS_PER_PROBLEM * config.train_size
    held_out_source = _generator(config, config.seed, held_out_draws)
    train_source = _generator(config, config.seed + held_out_draws, train_draws)

    held_out = _draw(held_out_source, config.held_out_size, config, taken=frozenset())
    train = _draw(train_source, config.train_size, config, taken=frozenset(held_out))
    sides = {"held_out": held_out, "train": train}
    entries = {f"{side}-{i}": entry for side, drawn in sides.items() for i, entry in enumerate(drawn.values())}

    def problems(side: str) -> list[Problem]:
        return [
            Problem(id=f"{side}-{i}", messages=_messages(entry, config), answer=str(entry["answer"] or ""))
            for i, entry in enumerate(sides[side].values())
        ]

    def score(problem: Problem, text: str) -> float:
        answer = tagged_answer(text)
        if answer is None:
            return 0.0
        try:
            value = float(train_source.score_answer(answer, entries[problem.id]))
        except Exception as error:  # the rules evaluate what a model wrote
            logger.warning("%s could not score %.80r: %r", config.name, answer, error)
            return 0.0
        return min(1.0, max(0.0, value))

    return SplitTask(
        name=config.name,
        train=problems("train"),
        held_out=problems("held_out"),
        score=score,
        well_formed=lambda _, text: tagged_answer(text) is not None,
    )


def _generator(config: ReasoningGymTask, seed: int, size: int) -> Any:
    import reasoning_gym

    try:
        return reasoning_gym.create_dataset(config.name, seed=seed, size=size, **config.parameters)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym {config.name}: {error}") from error


def _draw(source: Any, size: int, config: ReasoningGymTask, taken: frozenset[str]) -> dict[str, dict[str, Any]]:
    """The first `size` items whose prompt keys are new, by key."""
    drawn: dict[str, dict[str, Any]] = {}
    for entry in islice(source, len(source)):
        if len(drawn) == size:
            break
        key = prompt_key(_messages(entry, config))
        if key not in taken:
            drawn.setdefault(key, entry)
    if len(drawn) < size:
        raise ValueError(
            f"reasoning-gym {config.name}: {size} problems asked for, {len(drawn)} different ones found in "
            f"{len(source)} draws; ask for fewer or widen `parameters`"
        )
    return drawn


def _messages(entry: dict[str, Any], config: ReasoningGymTask) -> tuple[Message, ...]:
    system = (Message("system", config.system),) if config.system else ()
    return (*system, Message("user", entry["question"]))
