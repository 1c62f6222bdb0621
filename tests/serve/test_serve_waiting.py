"""What a server waits for ends in time, and one cancellation is told from another."""

import asyncio
import sys

import pytest

from onnx_adapt.serve.waiting import within


async def slow(ended: list[str]) -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise


async def late() -> list[str]:
    ended: list[str] = []
    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, slow(ended))
    if sys.version_info >= (3, 11):
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
    await asyncio.sleep(0)  # nothing is left that would cancel what comes next
    return ended


def test_what_takes_too_long_is_cancelled_and_the_task_goes_on() -> None:
    assert asyncio.run(late()) == ["cancelled"]


def test_what_comes_in_time_is_given_and_so_are_its_errors() -> None:
    async def quick(value: int) -> float:
        await asyncio.sleep(0)
        return 1 / value

    assert asyncio.run(within(60, quick(2))) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(within(60, quick(0)))


def test_a_task_that_is_cancelled_by_others_is_not_late() -> None:
    async def cancelled() -> list[str]:
        ended: list[str] = []
        task = asyncio.ensure_future(within(60, slow(ended)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return ended

    assert asyncio.run(cancelled()) == ["cancelled"]
