"""The Ray Serve application: replicas of the model, the repository, and gateways before them.

    client -> Gateway -> Model (any number of replicas; one adapter is multiplexed to few)
                 |          |
                 +------ Repository (one: which version of which adapter is served)

A gateway turns an adapter's name into its present version, and versions never change what
they mean. So a replica that holds one need not ask whether it is still right, and Ray Serve
can route by it.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import tempfile
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.serve import metrics
from ray.serve.schema import LoggingConfig

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdaptError
from onnx_adapt.serve.batcher import Batcher, Job, Result
from onnx_adapt.serve.gateway import Gateway
from onnx_adapt.serve.http import api
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.repository import Entry, Repository
from onnx_adapt.serve.settings import Settings

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_QUEUE = 1000
"""Requests that one process may have under way; as many may wait, the rest get a 503."""


def application(settings: Settings) -> Any:
    """The application, for `ray.serve.run`.

    Raises:
        AdaptError: If the model or the folder of adapters cannot be used.
    """
    Repository(settings.model, settings.adapters, Path(), settings.base)  # what it refuses
    common: dict[str, Any] = {
        "max_ongoing_requests": _QUEUE,
        "max_queued_requests": _QUEUE,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": LoggingConfig(log_level="WARNING", enable_access_log=False),
    }
    waiting = {**common, "ray_actor_options": {"num_cpus": 0}}  # CPUs are for the model
    repository = serve.deployment(name="Repository", **waiting)(RepositoryActor).bind(settings)
    model = serve.deployment(
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.threads},
        **common,
    )(Model).bind(settings, repository)
    front = serve.deployment(name="Gateway", num_replicas=settings.gateways, **waiting)
    return front(serve.ingress(api)(Gateway)).bind(settings, model, repository)


class RepositoryActor:
    """The repository, looked at every while."""

    def __init__(self, settings: Settings) -> None:
        self._copies = tempfile.TemporaryDirectory(
            prefix="onnx-adapt-", ignore_cleanup_errors=True
        )
        self._repository = Repository(
            settings.model, settings.adapters, Path(self._copies.name), settings.base
        )
        self._repository.sweep()
        threading.Thread(target=self._watch, args=(settings.poll_s,), daemon=True).start()

    def __del__(self) -> None:
        """Serve calls this when a replica ends, and kills the process without another word."""
        self._copies.cleanup()

    def _watch(self, poll_s: float) -> None:
        while True:
            time.sleep(poll_s)
            try:
                self._repository.sweep()
            except Exception:  # the libraries of object stores may raise anything
                _log.exception("cannot look at the adapters; what is known is served")

    async def entries(self) -> Mapping[str, Entry]:
        """What there is."""
        return self._repository.entries

    async def read(self, version: str) -> tuple[str, bytes] | AdaptError:
        """The file of a version: what to call it, and its bytes."""
        return await _attempt(self._repository.read, version)

    async def load(self, name: str) -> AdaptError | None:
        """Check an adapter's file again, and serve it."""
        return await _attempt(self._repository.load, name)

    async def unload(self, name: str) -> AdaptError | None:
        """Serve an adapter no more."""
        return await _attempt(self._repository.unload, name)


async def _attempt(action: Callable[[str], _T], argument: str) -> _T | AdaptError:
    """Do something in a thread; Ray would log an error that is raised as a bug of ours."""
    try:
        return await asyncio.to_thread(action, argument)
    except AdaptError as error:
        return error


class _Held:
    """A loaded version: as long as anybody holds this, it stays loaded."""

    def __init__(self, name: str) -> None:
        self.name = name


class Model:
    """One replica: the base once, and the versions that were used last."""

    def __init__(self, settings: Settings, repository: Any) -> None:
        self._batcher = Batcher(
            settings.model,
            batch_axis=settings.batch_axis,
            threads=settings.threads,
            provider=settings.provider,
            max_rows=settings.max_batch_size,
        )
        self._runner = ThreadPoolExecutor(
            1
        )  # one run at a time: no more CPUs than it asked for
        self._repository = repository
        self._files = tempfile.TemporaryDirectory(
            prefix="onnx-adapt-", ignore_cleanup_errors=True
        )
        self._loads = itertools.count()
        self._swaps = metrics.Counter(
            "onnx_adapt_swaps", "Adapters loaded into a replica.", tag_keys=("adapter",)
        )
        self._mixed = metrics.Histogram(
            "onnx_adapt_batch_adapters",
            "Different adapters in a batch, the base among them.",
            boundaries=[1, 2, 4, 8, 16, 32, 64],
        )

        async def load(version: str) -> _Held:
            return await self._load(version)

        async def run_all(jobs: list[Job]) -> list[Result]:
            self._mixed.observe(len({str(job.adapter) for job in jobs}))
            return await self._run(jobs)

        self._held = serve.multiplexed(load, max_num_models_per_replica=settings.max_adapters)
        self._joined: Callable[[Job], Awaitable[Result]] = self._run_one
        if settings.batching:
            self._joined = serve.batch(
                max_batch_size=settings.max_batch_size,
                batch_wait_timeout_s=settings.batch_wait_ms / 1e3,
                batch_size_fn=self._count,
            )(run_all)

    def __del__(self) -> None:
        """Serve calls this when a replica ends, and kills the process without another word."""
        self._files.cleanup()

    async def describe(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        """The inputs and outputs of the model."""
        return self._batcher.inputs, self._batcher.outputs

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
            held = [await self._held(version) for version in blend]
        except AdaptError as error:
            return error
        names = [item.name for item in held]
        weights = dict(zip(names, blend.values(), strict=True))
        adapter = names[0] if list(weights.values()) == [1] else weights or None
        job = Job(feeds, tuple(outputs or self._batcher.outputs), adapter)
        # Ray Serve takes a batch apart by the adapter that requests were routed by; ours are
        # mixed, so the batch must not see it. `held` keeps the adapters until it has run.
        context = contextvars.Context()
        return await context.run(asyncio.ensure_future, self._joined(job))

    async def _run_one(self, job: Job) -> Result:
        (result,) = await self._run([job])
        return result

    async def _run(self, jobs: list[Job]) -> list[Result]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._runner, self._batcher.run, jobs)

    def _count(self, jobs: Sequence[Job]) -> int:
        return sum(self._batcher.rows(job.feeds) or 1 for job in jobs)

    async def _load(self, version: str) -> _Held:
        """Load a version under a name that was never used: it may have been there before."""
        found = await self._repository.read.remote(version)
        if isinstance(found, AdaptError):
            raise found
        file_name, data = found
        number = next(self._loads)
        path = Path(self._files.name) / f"{number}-{file_name}"
        name = f"{version}#{number}"
        await asyncio.to_thread(path.write_bytes, data)
        await asyncio.to_thread(self._batcher.session.load, name, path)
        held = _Held(name)
        weakref.finalize(held, self._unload, name, path)
        self._swaps.inc(tags={"adapter": version.rpartition("@")[0]})
        return held

    def _unload(self, name: str, path: Path) -> None:
        self._batcher.session.unload(name)
        path.unlink(missing_ok=True)
