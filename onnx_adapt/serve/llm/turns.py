"""Texts are written in turns: each generator, for one text or more, gets a step at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor

from onnx_adapt.errors import AdaptError, RequestError
from onnx_adapt.serve.llm.generation import Generation
from onnx_adapt.serve.llm.orders import Order
from onnx_adapt.serve.llm.rows import ApartError

_log = logging.getLogger(__name__)

_SHORT_S = 5e-3
"""How long steps may go on before what they made is told, if each of them takes less."""

_News = int | AdaptError | None
"""A token, what went wrong, or None for the end."""


class _Job:
    """A text that waits or is being written, and its news that nobody has taken yet."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.news: asyncio.Queue[_News] = asyncio.Queue()
        self.gone = False


class _Group:
    """Texts that one generator writes, each in a row of its own."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = jobs
        self.generation: Generation | None = None

    def left(self) -> list[_Job]:
        """The texts that somebody waits for."""
        left = None if self.generation is None else self.generation.left
        return [
            job
            for row, job in enumerate(self.jobs)
            if not job.gone and (left is None or row in left)
        ]

    def failed(self, error: AdaptError) -> list[tuple[_Job, _News]]:
        """The end of all texts that are left."""
        made: list[tuple[_Job, _News]] = [(job, error) for job in self.left()]
        self.jobs = []
        return made

    def close(self) -> None:
        """Let the generator go."""
        if self.generation is not None:
            self.generation.close()


class Turns:
    """Writes several texts at a time: a short one is not behind a long one.

    With three texts of which b is the shortest, the steps are a b c, a b c, a c, a c, ...

    Args:
        start: Begins texts; called in the thread, like the steps of what it returns.
        shares: Tells whether a text can be in the generator of others.
        thread: A single thread. onnxruntime-genai is never called in two at a time.
        most: How many texts are written at a time; each holds a cache of keys and values.
        most_waiting: How many may wait until one of those has ended.
        patience_s: How long a text may wait for its first token.
    """

    def __init__(
        self,
        start: Callable[[Sequence[Order]], Generation],
        shares: Callable[[Sequence[Order], Order], bool],
        thread: Executor,
        most: int,
        most_waiting: int,
        patience_s: float,
    ) -> None:
        self._start = start
        self._shares = shares
        self._thread = thread
        self._most = most
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._waiting: deque[_Job] = deque()
        self._again: list[_Job] = []
        self._written: deque[_Group] = deque()
        self._task: asyncio.Task[None] | None = None

    async def tokens(self, order: Order) -> AsyncGenerator[int, None]:
        """The tokens of a text, as they are made; who closes this ends the text.

        Raises:
            RequestError: If too many wait already, or it had to wait for too long.
            AdaptError: If it cannot be written.
        """
        if len(self._waiting) >= self._most_waiting:
            raise RequestError(
                f"{self._most_waiting} texts wait already", hint="try later", status=503
            )
        job = _Job(order)
        self._waiting.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())
        try:
            news = await asyncio.wait_for(job.news.get(), self._patience_s)
            while news is not None:
                if isinstance(news, AdaptError):
                    raise news
                yield news
                news = await job.news.get()
        except asyncio.TimeoutError as error:
            raise RequestError(
                f"no token within {self._patience_s:g} s", hint="try later", status=504
            ) from error
        finally:
            job.gone = True
            if job in self._waiting:
                self._waiting.remove(job)

    async def _write(self) -> None:
        """Give turns until there are no texts."""
        loop = asyncio.get_running_loop()
        while self._waiting or self._written:
            self._admit()
            for job, news in await loop.run_in_executor(self._thread, self._steps):
                job.news.put_nowait(news)
            self._waiting.extendleft(reversed(self._again))
            self._again = []

    def _admit(self) -> None:
        """Let texts that wait begin: the first, with those like it in its generator.

        A row counts until its generator is gone, which holds a cache for it.
        """
        free = self._most - sum(len(group.jobs) for group in self._written)
        while self._waiting and free > 0:
            jobs = [self._waiting.popleft()]
            first = jobs[0].order
            for job in sorted(self._waiting, key=lambda job: first.unlike(job.order)):
                orders = [row.order for row in jobs]
                if len(jobs) < free and self._shares(orders, job.order):
                    self._waiting.remove(job)
                    jobs.append(job)
            free -= len(jobs)
            self._written.append(_Group(jobs))

    def _steps(self) -> list[tuple[_Job, _News]]:
        """Give each generator a turn at most, and stop after a short while."""
        made: list[tuple[_Job, _News]] = []
        began = time.perf_counter()
        for _ in range(len(self._written)):
            made += self._turn(self._written.popleft())
            if time.perf_counter() - began > _SHORT_S:
                break
        return made

    def _turn(self, group: _Group) -> list[tuple[_Job, _News]]:
        """One step of a generator, which goes with the last of its texts."""
        made: list[tuple[_Job, _News]] = []
        try:
            if group.left():
                made = self._step(group)
        except ApartError:
            self._again += group.left()
            group.jobs = []
        except AdaptError as error:
            made = group.failed(error)
        except Exception:  # a bug; who waits must hear of it
            _log.exception("a text cannot be written")
            hint = "its log tells why"
            made = group.failed(RequestError("the server failed", hint=hint, status=500))
        if group.left():
            self._written.append(group)
        else:
            group.close()
        return made

    def _step(self, group: _Group) -> list[tuple[_Job, _News]]:
        """One step of a generator with a text that somebody waits for."""
        if group.generation is None:
            group.jobs = group.left()
            group.generation = self._start([job.order for job in group.jobs])
        generation = group.generation
        generation.left -= {row for row in generation.left if group.jobs[row].gone}
        made: list[tuple[_Job, _News]] = []
        for row, token in generation.step().items():
            made.append((group.jobs[row], token))
            if row not in generation.left:
                made.append((group.jobs[row], None))
        if generation.wasteful:
            for row in generation.left:
                group.jobs[row].order = generation.rest(row)
                self._again.append(group.jobs[row])
            generation.left.clear()
        return made
