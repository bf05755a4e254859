"""How a task is chosen in a run's configuration; imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from student_trainer.wording import Wording

RewardName = Literal["exact", "multiple_choice", "number", "math"]
"""The rules of `student_trainer.rewards`."""


class _TaskModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    privileged_text: Wording | None = None
    """What a teacher is told of this task's problems where the stage's own `privileged` has no text; {answer} and
    {reference} in it are replaced by each problem's own."""


class JsonlTask(_TaskModel):
    """Problems in JSON Lines files."""

    kind: Literal["jsonl"] = "jsonl"

    path: Path
    """A file with one JSON object a line: `prompt` (a string) or `messages` (of `role` and `content`), `answer`, and
    optionally `reference` (or `solution`)."""

    held_out_path: Path | None = None
    """A file of the same form for evaluation; without it `held_out_fraction` of `path` is held out."""

    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The expected share of prompts held out when there is no `held_out_path`; a hash of the prompt decides."""

    reward: RewardName = "math"
    """The rule that checks an answer."""

    system: str | None = None
    """A system message put before every prompt."""


class DatasetTask(_TaskModel):
    """Problems in a Hugging Face data set."""

    kind: Literal["dataset"] = "dataset"

    name: str
    """A data set's name, a local folder, or a file format ("json", "parquet", "csv") together with `data_files`."""

    subset: str | None = None
    """The data set's configuration, as `load_dataset` names it."""

    revision: str | None = None
    """The commit or tag to load; pin it for runs that must be repeatable."""

    data_files: dict[str, str] | None = None
    """Files by split, for a file format: `{train = "a.parquet", test = "b.parquet"}`."""

    train_split: str = "train"
    """The split to train on."""

    held_out_split: str | None = None
    """The split to evaluate on; without it `held_out_fraction` of `train_split` is held out."""

    held_out_fraction: float = Field(default=0.1, gt=0, lt=1)
    """The expected share of prompts held out when there is no `held_out_split`; a hash of the prompt decides."""

    prompt_column: str = "prompt"
    """A column of strings, or of lists of messages (`role`, `content`)."""

    answer_column: str = "answer"
    """A column of strings or numbers."""

    answer_mark: str | None = None
    """The answer is what follows the last such mark in its column: "####" for GSM8K."""

    reference_column: str | None = None
    """A column of worked solutions."""

    wrong_columns: tuple[str, ...] = ()
    """Columns with a wrong choice each, beside the right one in `answer_column` (GPQA's "Incorrect Answer 1" and so
    on). The choices follow the prompt under letters, in an order that a hash of the prompt decides."""

    choices_column: str | None = None
    """A column with the list of choices, of which `answer_column` gives the place, from 0, or the letter (MMLU)."""

    reward: RewardName = "math"
    """The rule that checks an answer."""

    system: str | None = None
    """A system message put before every prompt."""

    @model_validator(mode="after")
    def _choices_are_letters(self) -> Self:
        if self.wrong_columns and self.choices_column:
            raise ValueError("wrong_columns and choices_column both name the choices: give one of them")
        if (self.wrong_columns or self.choices_column) and self.reward != "multiple_choice":
            raise ValueError(
                f"the choices are answered by letter, and reward is {self.reward}: set it to multiple_choice"
            )
        return self


class ReasoningGymTask(_TaskModel):
    """Problems drawn by one of reasoning-gym's generators, checked by its own rule."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"

    name: str
    """A generator's name, as `reasoning_gym.create_dataset` takes it: "chain_sum", "leg_counting"."""

    train_size: int = Field(default=2000, ge=1)
    """How many different problems to train on."""

    held_out_size: int = Field(default=200, ge=1)
    """How many different problems to evaluate on."""

    seed: int = Field(default=0, ge=0)
    """Two runs with this seed see the same problems; the held-out ones depend on `seed` and `held_out_size` alone."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """The generator's own settings: `{min_terms = 2, max_terms = 4}`."""

    system: str | None = "Give the final answer alone between <answer> and </answer>."
    """A system message put before every prompt."""


class ToyTask(_TaskModel):
    """The toy world: chained sums that a model of 0.1-0.8 M parameters can learn in a minute."""

    kind: Literal["toy"] = "toy"

    min_terms: int = Field(default=3, ge=2)
    """Terms of the shortest sum."""

    max_terms: int = Field(default=5, ge=2, le=12)
    """Terms of the longest sum; lengths are drawn evenly until the sums of one are used up."""

    max_operand: int = Field(default=9, ge=1, le=99)
    """Terms are drawn evenly from 1 to this."""

    train_size: int = Field(default=20_000, ge=1)
    """How many different sums to train on."""

    held_out_size: int = Field(default=500, ge=1)
    """How many different sums to evaluate on. Which side a sum belongs to never depends on any setting."""

    rules: tuple[Literal["reversed", "terse"], ...] = ("reversed",)
    """The rules to draw from, evenly, for problems that have one."""

    rule_rate: float = Field(default=0.0, ge=0, le=1)
    """The share of problems whose answer obeys a rule: digits reversed, or the answer without the sums before it."""

    show_rule: bool = True
    """Whether the system message names the rule; False asks whether a model has made the rule its own."""

    hint_rate: float = Field(default=0.0, ge=0, le=1)
    """The share of problems whose prompt ends with the answer, for a teacher that will be told it."""

    error_rate: float = Field(default=0.0, ge=0, lt=1)
    """The chance a step of a reference that it holds a wrong sum, taken back at once: `3+5=9w8;`."""

    seed: int = Field(default=0, ge=0)
    """Two runs with this seed see the same problems."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.max_terms < self.min_terms:
            raise ValueError(f"max_terms {self.max_terms} is below min_terms {self.min_terms}")
        if self.rule_rate and not self.rules:
            raise ValueError(f"rule_rate {self.rule_rate} needs at least one of `rules`")
        return self


TaskConfig = Annotated[JsonlTask | DatasetTask | ReasoningGymTask | ToyTask, Field(discriminator="kind")]
"""Any task, told apart by `kind`."""
