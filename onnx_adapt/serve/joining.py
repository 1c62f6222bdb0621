"""Jobs that come while the model runs are joined into its next batch."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from onnx_adapt.serve.batcher import Job, Result

_SHORT_S = 1e-3
"""A batch that takes less than this runs at once: to hand it to a thread and back takes as
long, and longer where the interpreter lets threads wait for each other."""

_Waiting = tuple[Job, "asyncio.Future[Result]"]


class Joiner:
    """A queue before a model that runs one batch at a time, in a thread if it may take long.

    The first job that comes runs the batch, and callbacks run those after it: a task for them,
    and every step of the event loop that it takes, would cost as much as a small model.

    Args:
        run: Runs a batch; called in that thread if the batch may take long.
        rows: How many rows a job has.
        most: The most rows of a batch; a job with more runs alone. 1 joins nothing.
        wait_s: How long the first job of a batch waits for others.
    """

    def __init__(
        self,
        run: Callable[[list[Job]], Sequence[Result]],
        rows: Callable[[Job], int],
        most: int,
        wait_s: float,
    ) -> None:
        self._run = run
        self._rows = rows
        self._most = most
        self._wait_s = wait_s
        self._waiting: deque[_Waiting] = deque()
        self._pace = math.inf  # seconds for each number in the inputs
        self._thread = ThreadPoolExecutor(1)  # no more CPUs than a replica asked for
        self._busy = False  # whether a batch runs, or will in a moment

    async def run(self, job: Job) -> Result:
        """The result of a job, out of whichever batch it comes into."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((job, answer))
        if not self._busy:
            self._busy = True
            try:
                await asyncio.sleep(self._pause())
            except asyncio.CancelledError:
                answer.cancel()
                raise
            finally:  # others wait, even if this client goes
                self._run_next(loop)
        return await answer

    def _pause(self) -> float:
        """How long other jobs may come; for 0, those that this step of the loop brings."""
        return self._wait_s if len(self._waiting) < self._most else 0

    def _run_next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch of those that wait."""
        self._busy = False
        batch = self._next_batch()
        jobs = [job for job, _ in batch]
        if not jobs:
            return
        if self._size(jobs) * self._pace < _SHORT_S:
            try:
                _answer(batch, self._timed(jobs))
            except Exception as error:
                _fail(batch, error)
            self._go_on(loop)
        else:
            self._busy = True
            running = loop.run_in_executor(self._thread, self._timed, jobs)
            running.add_done_callback(lambda done: self._ran(loop, batch, done))

    def _ran(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting],
        done: asyncio.Future[Sequence[Result]],
    ) -> None:
        """Go on when the thread has run a batch."""
        error = done.exception()
        if error is None:
            _answer(batch, done.result())
        else:
            _fail(batch, error)
        self._go_on(loop)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Run the next batch, after answers went out and requests came in."""
        self._busy = bool(self._waiting)
        if self._busy:
            loop.call_later(self._pause(), self._run_next, loop)

    def _timed(self, jobs: list[Job]) -> Sequence[Result]:
        """Run a batch, and learn from it how long runs take."""
        began = time.perf_counter()
        results = self._run(jobs)
        pace = (time.perf_counter() - began) / self._size(jobs)
        known = self._pace < math.inf
        self._pace = 0.8 * self._pace + 0.2 * pace if known else pace
        return results

    @staticmethod
    def _size(jobs: list[Job]) -> int:
        return 1 + sum(array.size for job in jobs for array in job.feeds.values())

    def _next_batch(self) -> list[_Waiting]:
        """Those that waited longest, without those whose client has gone."""
        batch: list[_Waiting] = []
        left = self._most
        while self._waiting:
            job, answer = self._waiting[0]
            rows = self._rows(job)
            if batch and rows > left:
                break
            self._waiting.popleft()
            if not answer.done():
                batch.append((job, answer))
                left -= rows
        return batch


def _answer(batch: list[_Waiting], results: Sequence[Result]) -> None:
    for (_, answer), result in zip(batch, results, strict=True):
        if not answer.done():
            answer.set_result(result)


def _fail(batch: list[_Waiting], error: BaseException) -> None:
    """Tell those who wait of a bug."""
    for _, answer in batch:
        if not answer.done():
            answer.set_exception(error)
