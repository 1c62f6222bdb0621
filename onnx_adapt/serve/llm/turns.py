"""Texts are written in turns: each has a generator of its own, and gets a step at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor

from onnx_adapt.errors import AdaptError, RequestError
from onnx_adapt.serve.llm.model import Generation, Order

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
        self.generation: Generation | None = None
        self.gone = False


class Turns:
    """Writes several texts at a time: a short one is not behind a long one.

    With three texts of which b is the shortest, the steps are a b c, a b c, a c, a c, ...

    Args:
        start: Begins a text; called in the thread, like the steps of what it returns.
        thread: A single thread. onnxruntime-genai is never called in two at a time.
        most: How many texts are written at a time; each holds a cache of keys and values.
        most_waiting: How many may wait until one of those has ended.
        patience_s: How long a text may wait for its first token.
    """

    def __init__(
        self,
        start: Callable[[Order], Generation],
        thread: Executor,
        most: int,
        most_waiting: int,
        patience_s: float,
    ) -> None:
        self._start = start
        self._thread = thread
        self._most = most
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._waiting: deque[_Job] = deque()
        self._written: deque[_Job] = deque()
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
            while self._waiting and len(self._written) < self._most:
                self._written.append(self._waiting.popleft())
            for job, news in await loop.run_in_executor(self._thread, self._steps):
                job.news.put_nowait(news)

    def _steps(self) -> list[tuple[_Job, _News]]:
        """Give each text a turn at most, and stop after a short while."""
        made: list[tuple[_Job, _News]] = []
        began = time.perf_counter()
        for _ in range(len(self._written)):
            job = self._written.popleft()
            if job.gone:
                job.generation = None
            else:
                made += [(job, news) for news in self._turn(job)]
            if job.generation is not None:
                self._written.append(job)
            if time.perf_counter() - began > _SHORT_S:
                break
        return made

    def _turn(self, job: _Job) -> list[_News]:
        """One step of a text; its generator goes with its last one."""
        try:
            if job.generation is None:
                job.generation = self._start(job.order)
            token = job.generation.step()
        except AdaptError as error:
            job.generation = None
            return [error]
        except Exception:  # a bug; who waits must hear of it
            _log.exception("a text cannot be written")
            job.generation = None
            return [RequestError("the server failed", hint="its log tells why", status=500)]
        made: list[_News] = [] if token is None else [token]
        if job.generation.ended:
            job.generation = None
            made.append(None)
        return made
