"""Jobs that come while the model runs are joined into its next batch."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnx_adapt.serve.batcher import Job, Result

_SHORT_S = 1e-3
"""A batch that takes less than this runs at once: to hand it to a thread and back takes as
long, and longer where the interpreter lets threads wait for each other."""


class Joiner:
    """A queue before a model that runs one batch at a time, in a thread of its own.

    Args:
        run: Runs a batch; called in that thread.
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
        self._waiting: deque[tuple[Job, asyncio.Future[Result]]] = deque()
        self._pace = math.inf  # seconds for each number in the inputs
        self._thread = ThreadPoolExecutor(1)  # no more CPUs than a replica asked for
        self._runs: asyncio.Task[None] | None = None

    async def run(self, job: Job) -> Result:
        """The result of a job, out of whichever batch it comes into."""
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, answer))
        if self._runs is None or self._runs.done():
            self._runs = asyncio.create_task(self._run_waiting())
        return await answer

    async def _run_waiting(self) -> None:
        """Run batches until no job waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            if self._wait_s and len(self._waiting) < self._most:
                await asyncio.sleep(self._wait_s)
            batch = self._next_batch()
            jobs = [job for job, _ in batch]
            if not jobs:
                continue
            try:
                if self._size(jobs) * self._pace < _SHORT_S:
                    results = self._timed(jobs)
                    await asyncio.sleep(0)  # answers go out, and requests come in
                else:
                    results = await loop.run_in_executor(self._thread, self._timed, jobs)
            except Exception as error:  # a bug; those who wait must hear of it
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)

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
        return 1 + sum(np.size(array) for job in jobs for array in job.feeds.values())

    def _next_batch(self) -> list[tuple[Job, asyncio.Future[Result]]]:
        """Those that waited longest, without those whose client has gone."""
        batch: list[tuple[Job, asyncio.Future[Result]]] = []
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
