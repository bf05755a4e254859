"""Whether a teacher's answers are the answers to what was asked: every item once, every array of the asked shape.

A wrong answer is a Corrupted error that says what is wrong: nothing unchecked reaches a loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from protos.errors import Corrupted, InvalidRequest, TeacherError
from protos.records import GenerateItem, GenerateResult, ScoreItem, ScoreResult, crc32_of

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def check_score(item: ScoreItem, result: ScoreResult) -> None:
    """Raises Corrupted unless `result` has the shapes that `item` asked for and scored the ids that it sent."""
    num_tokens = len(item.completion_ids)
    num_candidates = 0 if item.candidate_ids is None else item.candidate_ids.shape[1]
    _check_equal("sampled_logprobs", result.sampled_logprobs.shape, (num_tokens,))
    _check_equal("top_ids", result.top_ids.shape, (num_tokens, item.top_k))
    _check_equal("top_logprobs", result.top_logprobs.shape, (num_tokens, item.top_k))
    _check_equal("candidate_logprobs", result.candidate_logprobs.shape, (num_tokens, num_candidates))
    _check_equal(
        "entropy", None if result.entropy is None else result.entropy.shape, (num_tokens,) if item.entropy else None
    )
    _check_equal("half_precision", result.half_precision, item.half_precision)
    _check_equal("completion_crc32", result.completion_crc32, crc32_of(item.completion_ids))


def check_generation(item: GenerateItem, result: GenerateResult) -> None:
    """Raises Corrupted unless `result` has the samples that `item` asked for, none longer than asked."""
    _check_equal("the number of samples", len(result.samples), item.num_samples)
    for sample in result.samples:
        _check_equal("logprobs", sample.logprobs.shape, sample.token_ids.shape)
        if len(sample.token_ids) > item.max_new_tokens:
            raise Corrupted(
                f"a sample has {len(sample.token_ids)} tokens; at most {item.max_new_tokens} were asked for"
            )


def check_num_items(num_items: int, max_items: int) -> None:
    """Raises InvalidRequest on a request of no or too many items."""
    if num_items == 0:
        raise InvalidRequest("the request has no items; send at least one", field="items")
    if num_items > max_items:
        raise InvalidRequest(f"the request has {num_items} items; send at most {max_items}", field="items")


async def each_once(
    replies: AsyncGenerator[tuple[int, _Result | TeacherError], None],
    items: Sequence[_Item],
    check: Callable[[_Item, _Result], None],
) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
    """Passes the replies on, checked; raises Corrupted on one that is wrong, unasked, repeated or missing.

    It closes the stream.
    """
    missing = set(range(len(items)))
    async with aclosing(replies):
        async for index, outcome in replies:
            if index not in missing:
                raise Corrupted(
                    f"the reply to items[{index}] was not asked for or came twice; {len(items)} items were sent"
                )
            missing.remove(index)
            if not isinstance(outcome, TeacherError):
                try:
                    check(items[index], outcome)
                except Corrupted as error:
                    raise Corrupted(error.message, field=f"items[{index}]") from None
            yield index, outcome
    if missing:
        raise Corrupted(f"no reply to items {sorted(missing)} of the {len(items)} sent")


async def errors_held(
    replies: AsyncGenerator[tuple[int, _Result | TeacherError], None],
) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
    """The outcomes as they come, errors held back until something succeeds; raises the first item's when nothing does.

    So a request in which nothing succeeds gets the transport's own status, and nothing else is ever delayed.
    """
    held: list[tuple[int, TeacherError]] | None = []
    async with aclosing(replies):
        async for index, outcome in replies:
            if held is not None and isinstance(outcome, TeacherError):
                held.append((index, outcome))
                continue
            yield index, outcome
            if held is not None:
                for reply in held:
                    yield reply
                held = None
    if held:
        raise min(held, key=lambda reply: reply[0])[1]


async def first(
    outcomes: asyncio.Queue[tuple[int, _Result | TeacherError]], num_items: int
) -> AsyncGenerator[tuple[int, _Result | TeacherError], None]:
    """The first `num_items` of the queue, as they come."""
    for _ in range(num_items):
        yield await outcomes.get()


async def in_order(replies: AsyncGenerator[tuple[int, _Result | TeacherError], None], num_items: int) -> list[_Result]:
    """The results by index; raises the first error that arrives, and closes the stream."""
    results: dict[int, _Result] = {}
    async with aclosing(replies):
        async for index, outcome in replies:
            if isinstance(outcome, TeacherError):
                raise outcome
            results[index] = outcome
    return [results[i] for i in range(num_items)]


def _check_equal(what: str, got: object, asked: object) -> None:
    if got != asked:
        raise Corrupted(f"the teacher's reply is wrong: {what} is {got}; what was asked for needs {asked}")
