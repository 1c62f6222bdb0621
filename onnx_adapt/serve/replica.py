"""One copy of the model, with the versions of adapters that were used last."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, AdaptError
from onnx_adapt.serve.batcher import Batcher, Job, Result
from onnx_adapt.serve.joining import Joiner
from onnx_adapt.serve.metrics import Metrics
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.settings import Settings

Fetch = Callable[[str], Awaitable[Path]]
"""Puts the file of a version where it stays until it is unlinked."""


class Held:
    """A loaded version: as long as anybody holds this, it stays loaded.

    Attributes:
        name: What the session calls it.
    """

    def __init__(self, name: str) -> None:
        self.name = name


class Recent:
    """The versions that were used last; each is loaded once, however many ask at a time."""

    def __init__(self, load: Callable[[str], Awaitable[Held]], most: int) -> None:
        self._load = load
        self._most = most
        self._held: OrderedDict[str, asyncio.Future[Held]] = OrderedDict()

    async def __call__(self, version: str) -> Held:
        """The version, loaded if it is not."""
        found = self._held.get(version)
        if found is None:
            found = self._held[version] = asyncio.ensure_future(self._load(version))
            found.add_done_callback(lambda done: self._forget_failed(version, done))
            while len(self._held) > self._most:
                self._held.popitem(last=False)  # whoever waits for it or uses it holds it
        else:
            self._held.move_to_end(version)
        return await asyncio.shield(found)  # others wait for it, if this client goes

    def _forget_failed(self, version: str, done: asyncio.Future[Held]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._held.get(version) is done:
            del self._held[version]


class Replica:
    """One copy of the model.

    Args:
        settings: What was said about the server.
        fetch: Where the files of versions come from.
        metrics: What counts loads and batches.
    """

    def __init__(self, settings: Settings, fetch: Fetch, metrics: Metrics) -> None:
        self._batcher = Batcher(
            settings.model,
            batch_axis=settings.batch_axis,
            threads=settings.threads,
            provider=settings.provider,
            max_rows=settings.max_batch_size,
        )
        self._fetch = fetch
        self._metrics = metrics
        self._loads = 0
        self._joiner = Joiner(
            self._run,
            lambda job: self._batcher.rows(job.feeds) or 1,
            settings.max_batch_size if settings.batching else 1,
            settings.batch_wait_ms / 1e3,
        )
        self.hold: Callable[[str], Awaitable[Held]] = Recent(self.load, settings.max_adapters)

    @property
    def specs(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        """The inputs and outputs of the model."""
        return self._batcher.inputs, self._batcher.outputs

    async def describe(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        """The inputs and outputs of the model."""
        return self.specs

    async def infer(
        self,
        feeds: Mapping[str, Array],
        datatypes: Mapping[str, str],
        outputs: Sequence[str],
        blend: Mapping[str, float],
    ) -> Result:
        """Run the model with a blend of versions; empty for the base."""
        try:
            self._batcher.check(feeds, datatypes, outputs)
            held = [await self.hold(version) for version in blend]
        except AdaptError as error:
            return error
        names = [item.name for item in held]
        weights = dict(zip(names, blend.values(), strict=True))
        adapter = names[0] if list(weights.values()) == [1] else weights or None
        # `held` keeps the adapters loaded until the job has run.
        return await self._joiner.run(
            Job(feeds, tuple(outputs or self._batcher.outputs), adapter)
        )

    def _run(self, jobs: list[Job]) -> list[Result]:
        self._metrics.ran(len({str(job.adapter) for job in jobs}))
        return self._batcher.run(jobs)

    async def load(self, version: str) -> Held:
        """Load a version under a name that was never used: it may have been there before.

        Raises:
            AdapterNotFoundError: If the version is not served any more.
            AdaptError: If it cannot be loaded.
        """
        try:
            path = await self._fetch(version)
        except FileNotFoundError as error:
            raise AdapterNotFoundError(
                f"adapter version {version!r} is gone", hint="ask for the present one"
            ) from error
        self._loads += 1
        name = f"{version}#{self._loads}"
        held = Held(name)
        weakref.finalize(held, self._unload, name, path)
        await asyncio.to_thread(self._batcher.session.load, name, path)
        self._metrics.loaded(version.rpartition("@")[0])
        return held

    def _unload(self, name: str, path: Path) -> None:
        with contextlib.suppress(AdapterNotFoundError):  # loading it failed
            self._batcher.session.unload(name)
        path.unlink(missing_ok=True)
