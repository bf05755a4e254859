"""What the commands that ask a running server are told; light, so that `--help` answers at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

Json = Annotated[bool, Parameter(name="--json", negative="")]
Flag = Annotated[bool, Parameter(negative="")]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """One text to score.

    Attributes:
        prompt: The prompt as the user's message of a chat, rendered by the server.
        prompt_ids: The prompt as token ids, as in 1,2,3.
        completion: The completion as text; needs --tokenizer.
        completion_ids: The completion as token ids, as in 1,2,3.
        tokenizer: The model's folder or hub name, for text.
        privileged_system: Privileged information as a system message.
        privileged_prefix: Privileged text before the user's message.
        privileged_suffix: Privileged text after the user's message.
        privileged_ids: Privileged token ids before the prompt's, as in 1,2,3.
        reference: A reference answer or solution as privileged information.
        reference_template: How the server words the reference.
        top_k: How many of the teacher's alternatives to show.
        temperature: Of log_softmax(logits / temperature).
        teacher: The served name; the server's first when empty.
        timeout_s: Seconds to wait for the answer.
        json: Print JSON instead of a table.
    """

    prompt: str | None = None
    prompt_ids: str | None = None
    completion: str | None = None
    completion_ids: str | None = None
    tokenizer: str | None = None
    privileged_system: str | None = None
    privileged_prefix: str | None = None
    privileged_suffix: str | None = None
    privileged_ids: str | None = None
    reference: str | None = None
    reference_template: str = "answer"
    top_k: int = 5
    temperature: float = 1.0
    teacher: str = ""
    timeout_s: float = 120.0
    json: Json = False

    def __post_init__(self) -> None:
        self._at_most_one_of("prompt", "prompt_ids")
        self._at_most_one_of("completion", "completion_ids")
        self._at_most_one_of(
            "privileged_system", "privileged_prefix", "privileged_suffix", "privileged_ids", "reference"
        )
        if self.completion is not None and self.tokenizer is None:
            raise ValueError("completion is text; add --tokenizer MODEL, or give --completion-ids")
        check_above(self, 0, "temperature", "timeout_s")
        check_at_least(self, 0, "top_k")

    def _at_most_one_of(self, *names: str) -> None:
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One load.

    Attributes:
        top_k: The teacher's K most likely ids a position.
        candidates: Ids of the caller's own a position (M).
        prompt_tokens: Tokens of each prompt.
        completion_tokens: Tokens of each completion.
        items: Items of one request.
        in_flight: Requests at a time.
        seconds: How long to ask; a request under way is waited for.
        requests: How many requests to ask, instead of a time.
        temperature: Of every item.
        half_precision: Ask for log-probs as float16.
        teacher: The served name; the server's first when empty.
        timeout_s: Seconds after which a request has failed.
        seed: Of the ids; equal seeds send equal texts, which the teacher may have in its cache.
        json: Print JSON instead of a table.
    """

    top_k: int = 20
    candidates: int = 0
    prompt_tokens: int = 40
    completion_tokens: int = 200
    items: int = 1
    in_flight: int = 16
    seconds: float = 10.0
    requests: int | None = None
    temperature: float = 1.0
    half_precision: Flag = False
    teacher: str = ""
    timeout_s: float = 120.0
    seed: int | None = None
    json: Json = False

    def __post_init__(self) -> None:
        check_at_least(self, 0, "top_k", "candidates", "seed")
        check_at_least(self, 1, "prompt_tokens", "completion_tokens", "items", "in_flight", "requests")
        check_above(self, 0, "seconds", "temperature", "timeout_s")


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """One examination.

    Attributes:
        bound: Nats by which equal requests may differ; 1e-4 for a float32 teacher and 5e-2 for others when absent.
        reference: A model's folder or hub name to compare tokenizer, template and log-probs with.
        seed: Of the random ids; a new one when absent.
        timeout_s: Seconds to wait for each answer.
        json: Print JSON instead of a table.
    """

    bound: float | None = None
    reference: str | None = None
    seed: int | None = None
    timeout_s: float = 120.0
    json: Json = False

    def __post_init__(self) -> None:
        check_at_least(self, 0, "seed", "bound")
        check_above(self, 0, "timeout_s")


def check_at_least(config: object, least: float, *names: str) -> None:
    """Raises ValueError unless every one of these numbers is finite and at least that; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def check_above(config: object, bound: float, *names: str) -> None:
    """Raises ValueError unless every one of these numbers is finite and above that."""
    for name in names:
        value = getattr(config, name)
        if not (value > bound and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be above {bound}")
