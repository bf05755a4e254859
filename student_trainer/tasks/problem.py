"""What a task is: problems with checkable answers, split so that no held-out prompt is ever trained on."""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from protos.records import Message

logger = logging.getLogger(__name__)

SHOWN_PROMPT_CHARS = 200
"""Of a prompt quoted in an error: enough to find it in a file."""


@dataclass(frozen=True)
class Problem:
    """One question.

    Attributes:
        id: unique within its task.
        messages: the student's prompt; ends with a user message.
        answer: what the reward checks a completion against.
        reference: a worked solution, the text of SFT and of privileged information; None when there is none.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    reference: str | None = None


class Task(Protocol):
    """Problems to train on, problems to measure on, and the rule that checks an answer."""

    @property
    def name(self) -> str:
        """A name for logs and reports."""
        ...

    @property
    def train(self) -> Sequence[Problem]:
        """What the student may learn from."""
        ...

    @property
    def held_out(self) -> Sequence[Problem]:
        """What only evaluation may see; shares no prompt with `train`."""
        ...

    def reward(self, problem: Problem, text: str) -> float:
        """How right the completion `text` is, in [0, 1]; never raises, whatever the text."""
        ...

    def is_well_formed(self, problem: Problem, text: str) -> bool:
        """Whether an answer can be read from `text`, right or wrong."""
        ...


@dataclass(frozen=True)
class SplitTask:
    """The `Task` that every loader builds.

    Raises:
        ValueError: a side is empty, an id occurs twice, or a prompt occurs on both sides.
    """

    name: str
    train: Sequence[Problem]
    held_out: Sequence[Problem]
    score: Callable[[Problem, str], float]
    well_formed: Callable[[Problem, str], bool]

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise ValueError(
                f"task {self.name}: {len(self.train)} train and {len(self.held_out)} held-out problems; "
                "both sides need at least one"
            )
        ids = [problem.id for problem in (*self.train, *self.held_out)]
        if len(set(ids)) != len(ids):
            raise ValueError(f"task {self.name}: {len(ids)} problems have {len(set(ids))} different ids")
        check_disjoint(self.train, self.held_out)

    def reward(self, problem: Problem, text: str) -> float:
        """See `Task`."""
        return self.score(problem, text)

    def is_well_formed(self, problem: Problem, text: str) -> bool:
        """See `Task`."""
        return self.well_formed(problem, text)


def prompt_key(messages: Iterable[Message]) -> str:
    """What makes two prompts the same question, as a SHA-256 in hexadecimal.

    System messages, case, Unicode compatibility forms and runs of white space do not count: an instruction put before a
    question does not make it another question.
    """
    turns = [
        (message.role, " ".join(unicodedata.normalize("NFKC", message.content).casefold().split()))
        for message in messages
        if message.role != "system"
    ]
    return hashlib.sha256(repr(turns).encode()).hexdigest()


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out side.

    The key alone decides, so a prompt stays on its side when the data grows, shrinks or is reordered.

    Args:
        key: from `prompt_key`.
        fraction: the expected share of prompts held out, in [0, 1].
    """
    return int(key[:16], 16) < fraction * 2**64


def distinct(problems: Iterable[Problem]) -> list[Problem]:
    """The first problem of every prompt, in order; how many repeats were dropped is logged."""
    by_key: dict[str, Problem] = {}
    num_seen = 0
    for problem in problems:
        num_seen += 1
        by_key.setdefault(prompt_key(problem.messages), problem)
    if num_seen > len(by_key):
        logger.warning("dropped %d of %d problems: their prompts repeat earlier ones", num_seen - len(by_key), num_seen)
    return list(by_key.values())


def split(problems: Iterable[Problem], fraction: float) -> tuple[list[Problem], list[Problem]]:
    """Train and held-out problems, by `is_held_out` of each prompt."""
    sides: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        sides[is_held_out(prompt_key(problem.messages), fraction)].append(problem)
    return sides


def check_disjoint(train: Iterable[Problem], held_out: Iterable[Problem]) -> None:
    """Raises ValueError with the first held-out prompt that is also trained on."""
    train_ids = {prompt_key(problem.messages): problem.id for problem in train}
    for problem in held_out:
        train_id = train_ids.get(prompt_key(problem.messages))
        if train_id is not None:
            shown = " | ".join(message.content for message in problem.messages if message.role != "system")
            raise ValueError(
                f"held-out problem {problem.id} is also train problem {train_id}: {shown[:SHOWN_PROMPT_CHARS]!r}; "
                "take it out of one side"
            )
