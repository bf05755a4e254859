"""What a teacher writes for the student to learn by SFT: asked for once, filtered by reward, kept in the run folder.

traces.jsonl            the traces that are learnt; a file that a task of the kind jsonl takes as well
traces_rejected.jsonl   those that are not: the reward is too low, or the budget cut them

A line has `messages`, `answer` and the trace as `reference`, and besides `problem`, `sample`, `reward`, `is_finished`
and the `weights_version` that wrote it. A trace is a text, so that the teacher's tokenizer may be another than the
student's. A run that was killed asks for what is on neither file.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from protos.credentials import Tls
from protos.records import GenerateResult, Message, Privileged
from student_trainer import interrupt
from student_trainer.config import TracesConfig, TrainConfig
from student_trainer.durable import replace_text
from student_trainer.privileged import privileged_of, refusals
from student_trainer.progress import Counter, duration
from student_trainer.rollout.base import SamplingParams
from student_trainer.run_folder import RunFolderError, read_rows
from student_trainer.scoring import Scorer
from student_trainer.seeds import TRACES, derive_seed
from student_trainer.tasks import Problem, Task
from student_trainer.teacher_identity import TEACHER_FILE, TeacherIdentity, TeacherMismatch

KEPT_FILE, REJECTED_FILE = "traces.jsonl", "traces_rejected.jsonl"

PROBLEMS_PER_REQUEST = 32
"""Between two looks at the clock and at signals; a killed run asks for as many again."""

REQUESTS_AHEAD = 4
"""On their way at once, so that the server has work while an answer is judged and written down."""

Row = dict[str, Any]


def teacher_traces(config: TrainConfig, traces: TracesConfig, task: Task, *, quiet: bool = False) -> list[Problem]:
    """The problems whose `reference` is a trace to learn, written by the teacher of `config` as far as none is there.

    Raises:
        ValueError: no trace is good enough.
        RunFolderError: the run folder cannot be written.
        TeacherError, TeacherMismatch, Stopped: the teacher failed, is not the one that began, or a signal came; what
            was written is kept.

    One rank calls it: the others have no use for the teacher.
    """
    book = _Book(Path(config.run), traces.min_reward)
    places = dict(enumerate(task.train[: traces.num_problems]))
    num_wanted = len(places) * traces.samples_per_problem
    left = {place: one for place, one in places.items() if not book.has(one, traces.samples_per_problem)}
    counter = Counter(f"traces {config.run}", "trace", num_wanted, start=book.num_written, quiet=quiet)
    if left:
        told = privileged_of(config.privileged) if config.privileged else None
        if told is not None:
            for problem in left.values():  # one without what the teacher is to be told is found now
                told(problem)
        with counter, _connected(config, told) as scorer:
            started, num_before = time.monotonic(), book.num_written
            for problem, result in _written(scorer, left, config, traces):
                num_new = book.add(problem, result, task)
                pace_s = (time.monotonic() - started) / max(1, book.num_written - num_before)
                left_s = pace_s * (num_wanted - book.num_written)
                counter.advance(num_new, f"kept {len(book.kept)}  {duration(left_s)} left")
    counter.say(f"traces: {len(book.kept)} kept of {book.num_written} that the teacher wrote ({book.kept_file})")
    if not book.kept:
        raise ValueError(
            f"none of the {book.num_written} traces that the teacher wrote has ended with a reward of "
            f"{traces.min_reward:g} (stage.traces.min_reward); read {book.rejected_file}, and choose another `run`"
        )
    return [_problem_of(row) for row in book.kept]


def _connected(config: TrainConfig, told: Callable[[Problem], Privileged] | None) -> Scorer:
    """A connection to the teacher that wrote the traces which are there already, if any are."""
    assert config.teacher is not None
    scorer = Scorer(
        config.teacher.url,
        temperature=1.0,
        timeout_s=config.teacher.timeout_s,
        max_wait_s=config.teacher.max_wait_s,
        tls=Tls(ca=config.teacher.ca) if config.teacher.ca else None,
        privileged=told,
    )
    try:
        if config.privileged and (reasons := refusals(config.privileged, scorer.info)):
            raise TeacherMismatch(f"teacher {config.teacher.url}: " + "; ".join(reasons))
        TeacherIdentity.of(scorer.info).hold_alone(Path(config.run) / TEACHER_FILE)
    except BaseException:
        scorer.close()
        raise
    return scorer


def _written(
    scorer: Scorer, problems: dict[int, Problem], config: TrainConfig, traces: TracesConfig
) -> Iterator[tuple[Problem, GenerateResult]]:
    """Each problem with what the teacher wrote, in order; a problem's place in the task seeds it."""
    params = SamplingParams(
        max_new_tokens=traces.max_new_tokens or config.rollout.max_new_tokens,
        temperature=traces.temperature,
        top_p=traces.top_p,
        num_samples=traces.samples_per_problem,
    )
    places = list(problems)
    ahead: deque[tuple[Sequence[int], Future[list[GenerateResult]]]] = deque()
    try:
        for start in range(0, len(places), PROBLEMS_PER_REQUEST):
            part = places[start : start + PROBLEMS_PER_REQUEST]
            seeds = [derive_seed(config.seed, TRACES, place) for place in part]
            ahead.append((part, scorer.write([problems[place] for place in part], params, seeds=seeds)))
            if len(ahead) == REQUESTS_AHEAD:
                yield from _answered(*ahead.popleft(), problems)
        while ahead:
            yield from _answered(*ahead.popleft(), problems)
    finally:
        for _, request in ahead:
            request.cancel()


def _answered(
    part: Sequence[int], request: Future[list[GenerateResult]], problems: dict[int, Problem]
) -> Iterator[tuple[Problem, GenerateResult]]:
    interrupt.raise_if_requested()
    yield from zip((problems[place] for place in part), request.result(), strict=True)


class _Book:
    """The two files of a run, and what is in them."""

    def __init__(self, run: Path, min_reward: float) -> None:
        self.kept_file, self.rejected_file = run / KEPT_FILE, run / REJECTED_FILE
        self._min_reward = min_reward
        self.kept, self._rejected = _whole_rows(self.kept_file), _whole_rows(self.rejected_file)
        self._done = {(row["problem"], row["sample"]) for row in (*self.kept, *self._rejected)}

    @property
    def num_written(self) -> int:
        """Traces in both files."""
        return len(self._done)

    def has(self, problem: Problem, num_samples: int) -> bool:
        """Whether so many traces of this problem are there."""
        return all((problem.id, number) in self._done for number in range(num_samples))

    def add(self, problem: Problem, result: GenerateResult, task: Task) -> int:
        """Judges the traces of a problem and writes down those that are not there yet; returns how many."""
        num_before = self.num_written
        for number, sample in enumerate(result.samples):
            if (problem.id, number) in self._done:
                continue
            row = {
                "messages": [{"role": message.role, "content": message.content} for message in problem.messages],
                "answer": problem.answer,
                "reference": sample.text,
                "problem": problem.id,
                "sample": number,
                "reward": task.reward(problem, sample.text),
                "is_finished": sample.finish_reason == "stop",
                "weights_version": result.weights_version,
            }
            is_kept = row["is_finished"] and row["reward"] >= self._min_reward
            _append(self.kept_file if is_kept else self.rejected_file, row)
            (self.kept if is_kept else self._rejected).append(row)
            self._done.add((problem.id, number))
        return self.num_written - num_before


def _problem_of(row: Row) -> Problem:
    messages = tuple(Message(turn["role"], turn["content"]) for turn in row["messages"])
    return Problem(f"{row['problem']}/{row['sample']}", messages, row["answer"], row["reference"])


def _whole_rows(file: Path) -> list[Row]:
    """The file's rows; a line that a killed process left half written is cut off."""
    if not file.exists():
        return []
    rows = read_rows(file)
    replace_text(file, "".join(map(_line, rows)))
    return rows


def _append(file: Path, row: Row) -> None:
    try:
        with file.open("a") as out:
            out.write(_line(row))
    except OSError as error:
        raise RunFolderError(
            f"{file} cannot be written: {error.strerror}; mend the disk and run the same command to go on"
        ) from None


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
