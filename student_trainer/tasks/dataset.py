"""Problems in a Hugging Face data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from student_trainer.tasks.choices import letter_of, lettered, shuffled
from student_trainer.tasks.config import DatasetTask
from student_trainer.tasks.problem import SplitTask
from student_trainer.tasks.rows import task_of_rows


def dataset_task(config: DatasetTask) -> SplitTask:
    """The task in a data set, its columns named by `config`.

    Raises:
        ValueError: a split or column is missing, or a row is wrong; the message names it.
    """
    held_out = None if config.held_out_split is None else _rows(config, config.held_out_split)
    return task_of_rows(config, config.name, _rows(config, config.train_split), held_out)


def _rows(config: DatasetTask, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import Dataset, load_dataset

    dataset = load_dataset(
        config.name, config.subset, data_files=config.data_files, split=split, revision=config.revision
    )
    assert isinstance(dataset, Dataset), "a named split that is not streamed is one table"
    wanted: dict[str, str | None] = {
        "prompt_column": config.prompt_column,
        "answer_column": config.answer_column,
        "reference_column": config.reference_column,
        "choices_column": config.choices_column,
        **{f"wrong_columns[{place}]": column for place, column in enumerate(config.wrong_columns)},
    }
    for setting, column in wanted.items():
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{config.name}[{split}]: {setting} {column!r} is not one of {dataset.column_names}")
    for index, columns in enumerate(dataset):
        place = f"{config.name}[{split}] row {index}"
        yield place, _row(place, dict(columns), config)


def _row(place: str, columns: dict[str, Any], config: DatasetTask) -> dict[str, Any]:
    prompt, answer = columns[config.prompt_column], columns[config.answer_column]
    reference = columns[config.reference_column] if config.reference_column else None
    if config.answer_mark is not None:
        _, mark, end = str(answer).rpartition(config.answer_mark)
        if not mark:
            raise ValueError(f"{place}: {config.answer_column}: no answer_mark {config.answer_mark!r} in {answer!r}")
        answer = end.strip()
    if config.wrong_columns or config.choices_column:
        prompt, answer = _with_choices(place, columns, config)
    return {"messages" if isinstance(prompt, list) else "prompt": prompt, "answer": answer, "reference": reference}


def _with_choices(place: str, columns: dict[str, Any], config: DatasetTask) -> tuple[str, str]:
    """The prompt with its choices, and the right one's letter."""
    prompt, answer = columns[config.prompt_column], columns[config.answer_column]
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: {config.prompt_column}: choices need a prompt of text, and this is {prompt!r}")
    if config.choices_column is None:
        return shuffled(prompt, str(answer).strip(), [str(columns[column]).strip() for column in config.wrong_columns])
    choices = [str(choice) for choice in columns[config.choices_column]]
    try:
        return lettered(prompt, choices), letter_of(answer, len(choices))
    except ValueError as error:
        raise ValueError(f"{place}: {config.answer_column}: {error}") from None
