import asyncio

import pytest

from protos.together import together


def test_results_are_in_the_order_of_the_calls():
    async def after(seconds):
        await asyncio.sleep(seconds)
        return seconds

    assert asyncio.run(together(after(seconds) for seconds in (0.02, 0.0, 0.01))) == [0.02, 0.0, 0.01]
    assert asyncio.run(together([])) == []


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_nothing_is_left_of_the_others_when_one_fails_or_the_caller_leaves(is_cancelled):
    ended = []

    async def other(name):
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # an engine is told, say
            ended.append(name)

    async def fails():
        await asyncio.sleep(60 if is_cancelled else 0)
        raise ValueError("out of order")

    async def scenario():
        task = asyncio.create_task(together([other("a"), fails(), other("b")]))
        await asyncio.sleep(0.01)
        if is_cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if is_cancelled else ValueError):
            await task
        return list(ended)

    assert sorted(asyncio.run(scenario())) == ["a", "b"]
