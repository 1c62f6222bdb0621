"""One copy of the model, with the versions of adapters that were used last."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, AdaptError
from onnx_adapt.serve.batcher import Batcher, Job, Result
from onnx_adapt.serve.held import Fetch, Held, Loads, Recent
from onnx_adapt.serve.joining import Joiner
from onnx_adapt.serve.metrics import Metrics
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.settings import Settings


class Replica:
    """One copy of the model.

    Args:
        settings: What was said about the server.
        fetch: Where the files of versions come from.
        metrics: What counts loads and batches.

    Attributes:
        recent: What keeps versions loaded.
        hold: What gives a version, loaded.
    """

    def __init__(self, settings: Settings, fetch: Fetch, metrics: Metrics) -> None:
        self._batcher = Batcher(
            settings.model,
            batch_axis=settings.batch_axis,
            threads=settings.threads,
            provider=settings.provider,
            max_rows=settings.max_batch_size,
        )
        self._metrics = metrics
        self._joiner = Joiner(
            self._run,
            lambda job: self._batcher.rows(job.feeds) or 1,
            settings.max_batch_size if settings.batching else 1,
            settings.batch_wait_ms / 1e3,
        )
        self.load = Loads(fetch, self._batcher.session.load, self._unload, metrics)
        self.recent = Recent(self.load, settings.max_adapters)
        self.hold: Callable[[str], Awaitable[Held]] = self.recent

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

    def _unload(self, name: str, source: Path | Adapter) -> None:
        with contextlib.suppress(AdapterNotFoundError):  # loading it failed
            self._batcher.session.unload(name)
        if isinstance(source, Path):
            source.unlink(missing_ok=True)
