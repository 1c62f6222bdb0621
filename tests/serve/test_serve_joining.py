"""Jobs that come together run together, and nothing that happens to one harms another."""

import asyncio
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from onnx_adapt.serve.batcher import Job, Result
from onnx_adapt.serve.joining import Joiner


class Doubling:
    """A model that doubles its input, and notes its batches."""

    def __init__(self, seconds: float = 0) -> None:
        self.seconds = seconds
        self.batches: list[list[float]] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        time.sleep(self.seconds)
        self.batches.append([float(job.feeds["x"][0]) for job in jobs])
        if -1 in self.batches[-1]:
            raise ZeroDivisionError
        return [{"y": 2 * job.feeds["x"]} for job in jobs]


def joined(model: Doubling, most: int = 8, wait_s: float = 0) -> Joiner:
    return Joiner(model, lambda job: len(job.feeds["x"]), most, wait_s)


async def answer(joiner: Joiner, value: float) -> float:
    result = await joiner.run(Job({"x": np.array([value])}, ("y",)))
    assert isinstance(result, dict)
    return float(result["y"][0])


async def known(joiner: Joiner) -> None:
    """Let the joiner learn how long runs take."""
    await answer(joiner, 0)


@pytest.mark.parametrize("seconds", [0, 0.02])  # at once, and in the thread
def test_jobs_of_one_step_are_one_batch_of_at_most_so_many_rows(seconds: float) -> None:
    model = Doubling(seconds)

    async def ask() -> list[float]:
        joiner = joined(model, most=3)
        await known(joiner)
        return await asyncio.gather(*(answer(joiner, value) for value in range(1, 6)))

    assert asyncio.run(ask()) == [2, 4, 6, 8, 10]
    assert model.batches == [[0], [1, 2, 3], [4, 5]]


def test_a_job_waits_for_others_as_long_as_was_said() -> None:
    model = Doubling()

    async def ask() -> list[float]:
        joiner = joined(model, wait_s=0.2)
        first = asyncio.ensure_future(answer(joiner, 1))
        await asyncio.sleep(0.01)
        return [await answer(joiner, 2), await first]

    assert asyncio.run(ask()) == [4, 2]
    assert model.batches == [[1, 2]]


@pytest.mark.parametrize("seconds", [0, 0.02])
def test_a_client_that_goes_takes_nobody_with_it_and_is_not_run(seconds: float) -> None:
    model = Doubling(seconds)

    async def ask() -> float:
        joiner = joined(model)
        await known(joiner)
        first, second = (asyncio.ensure_future(answer(joiner, value)) for value in (1, 2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        return await second

    assert asyncio.run(ask()) == 4
    assert model.batches == [[0], [2]]


@pytest.mark.parametrize("seconds", [0, 0.02])
def test_a_bug_is_told_to_all_of_its_batch_and_the_next_one_runs(seconds: float) -> None:
    async def ask() -> tuple[list[float | BaseException], float]:
        joiner = joined(Doubling(seconds))
        await known(joiner)
        both = (answer(joiner, value) for value in (-1, 1))
        failed = await asyncio.gather(*both, return_exceptions=True)
        return failed, await answer(joiner, 3)

    failed, after = asyncio.run(ask())
    assert [type(error) for error in failed] == [ZeroDivisionError] * 2
    assert after == 6


def test_a_model_that_takes_long_leaves_the_event_loop_free() -> None:
    free = threading.Event()

    def run(jobs: Sequence[Job]) -> list[Result]:
        assert free.wait(60)  # the event loop must set it meanwhile
        return [{"y": job.feeds["x"]} for job in jobs]

    async def ask() -> float:
        joiner = Joiner(run, lambda job: 1, 8, 0)
        running = asyncio.ensure_future(answer(joiner, 1))
        await asyncio.sleep(0.01)
        free.set()
        return await running

    assert asyncio.run(ask()) == 1
