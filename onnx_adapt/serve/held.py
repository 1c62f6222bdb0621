"""Versions of adapters that are loaded: for as long as anybody holds them."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.errors import AdapterNotFoundError, RequestError
from onnx_adapt.serve.metrics import Metrics
from onnx_adapt.serve.tracing import span

Fetch = Callable[[str], Awaitable[Path | Adapter]]
"""Puts the file of a version where it stays until it is unlinked; or brings what it holds."""


class Held:
    """A loaded version: as long as anybody holds this, it stays loaded.

    Attributes:
        name: What the session calls it.
    """

    def __init__(self, name: str) -> None:
        self.name = name


class Loads:
    """Loads versions, each under a name that was never used: it may have been there before.

    Args:
        fetch: Where their files come from.
        load: Loads what was fetched under a name.
        unload: Unloads what has this name, if anything has, and removes its file, if any.
        metrics: What counts loads.
        thread: Where files are loaded; by default in any thread.
    """

    def __init__(
        self,
        fetch: Fetch,
        load: Callable[[str, Any], Any],
        unload: Callable[[str, Any], None],
        metrics: Metrics,
        thread: Executor | None = None,
    ) -> None:
        self._fetch = fetch
        self._load = load
        self._unload = unload
        self._metrics = metrics
        self._thread = thread
        self._count = 0

    async def __call__(self, version: str) -> Held:
        """Load a version; it is unloaded when nobody holds it any more.

        Raises:
            AdapterNotFoundError: If it is not served any more.
            RequestError: If there is no room for its file at this time.
            AdaptError: If it cannot be loaded.
        """
        with span("load adapter", {"onnx_adapt.version": version}):
            return await self._loaded(version)

    async def _loaded(self, version: str) -> Held:
        try:
            found = await self._fetch(version)
        except FileNotFoundError as error:
            raise AdapterNotFoundError(
                f"adapter version {version!r} is gone", hint="ask for the present one"
            ) from error
        except OSError as error:  # a full disk, or too many open files
            raise RequestError(
                f"adapter version {version!r} cannot be copied: {error}",
                hint="try later",
                status=503,
            ) from error
        self._count += 1
        held = Held(f"{version}#{self._count}")
        weakref.finalize(held, self._unload, held.name, found)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load, held.name, found)
        self._metrics.loaded(version.rpartition("@")[0])
        return held


class Recent:
    """The versions that were used last; each is loaded once, however many ask at a time.

    Args:
        load: Loads a version.
        most: How many are kept.
    """

    def __init__(self, load: Callable[[str], Awaitable[Held]], most: int) -> None:
        self._load = load
        self._most = most
        self._held: OrderedDict[str, asyncio.Future[Held]] = OrderedDict()
        self._pinned: frozenset[str] = frozenset()

    async def __call__(self, version: str) -> Held:
        """The version, loaded if it is not."""
        found = self._held.get(version)
        if found is None:
            found = self._held[version] = asyncio.ensure_future(self._load(version))
            found.add_done_callback(lambda done: self._forget_failed(version, done))
            self._evict()
        else:
            self._held.move_to_end(version)
        if found.done():
            return found.result()
        return await asyncio.shield(found)  # others wait for it, if this client goes

    async def pin(self, versions: Iterable[str]) -> None:
        """Load some versions, and keep them until others are pinned.

        Raises:
            AdaptError: If one cannot be loaded; those before it are.
        """
        self._pinned = frozenset(versions)
        for version in sorted(self._pinned):
            await self(version)

    def _evict(self) -> None:
        """Forget those that were not used for longest; whoever uses one holds it."""
        free = (version for version in list(self._held) if version not in self._pinned)
        for version in itertools.islice(free, max(len(self._held) - self._most, 0)):
            del self._held[version]

    def _forget_failed(self, version: str, done: asyncio.Future[Held]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._held.get(version) is done:
            del self._held[version]
