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
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.schema import LoggingConfig

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.adapter.files import read_adapter
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdaptError, RequestError
from onnx_adapt.serve.access import read_access
from onnx_adapt.serve.batcher import Result
from onnx_adapt.serve.copies import Copies
from onnx_adapt.serve.gateway import Gateway, News, ReplicaDiedError
from onnx_adapt.serve.held import Held
from onnx_adapt.serve.http import api
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.ray_metrics import RayMetrics
from onnx_adapt.serve.records import open_access_log
from onnx_adapt.serve.replica import Replica
from onnx_adapt.serve.repository import Repository
from onnx_adapt.serve.settings import Settings

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_QUEUE = 1000
"""Requests that one process may have under way; as many may wait, the rest get a 503."""
_STOPPING_S = 0.1
"""How often a gateway asks for news while the application stops."""


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
    return front(serve.ingress(_api)(Front)).bind(settings, model, repository)


class RepositoryActor:
    """The repository, looked at every while; it also knows when the application stops."""

    def __init__(self, settings: Settings) -> None:
        self._copies = Copies()
        self._repository = Repository(
            settings.model,
            settings.adapters,
            self._copies.path,
            settings.base,
            settle_s=settings.settle_s,
        )
        self._repository.sweep()
        self._stopping = False
        self._silent_s = 3 * settings.poll_s + 5
        self._heard: dict[str, tuple[float, int]] = {}
        threading.Thread(target=self._watch, args=(settings.poll_s,), daemon=True).start()

    def __del__(self) -> None:
        """Serve calls this when a replica ends, and kills the process without another word."""
        self._copies.close()

    def _watch(self, poll_s: float) -> None:
        while True:
            time.sleep(poll_s)
            try:
                self._repository.sweep()
            except Exception:  # the libraries of object stores may raise anything
                _log.exception("cannot look at the adapters; what is known is served")

    async def news(self, gateway: str, under_way: int) -> News:
        """What a gateway should know, for what it says of itself."""
        self._heard[gateway] = time.monotonic(), under_way
        return News(self._repository.entries, self._stopping)

    async def stop(self) -> bool:
        """Let no gateway take a request any more; whether all have answered theirs."""
        self._stopping = True
        since = time.monotonic() - self._silent_s  # those that are silent are dead
        return all(busy == 0 for heard, busy in self._heard.values() if heard > since)

    async def read(self, version: str) -> tuple[str, bytes] | AdaptError:
        """The file of a version: what to call it, and its bytes."""
        try:
            return await _attempt(self._repository.read, version)
        except FileNotFoundError:  # a sweep was faster: now the repository says so itself
            return await _attempt(self._repository.read, version)

    async def load(self, name: str) -> AdaptError | None:
        """Check an adapter's file again, and serve it."""
        return await _attempt(self._repository.load, name)

    async def unload(self, name: str) -> AdaptError | None:
        """Serve an adapter no more."""
        return await _attempt(self._repository.unload, name)

    async def point(self, name: str, adapter: str) -> AdaptError | None:
        """Let an alias mean an adapter."""
        return await _attempt(self._repository.point, name, adapter)


async def _attempt(action: Callable[..., _T], *arguments: str) -> _T | AdaptError:
    """Do something in a thread; Ray would log an error that is raised as a bug of ours."""
    try:
        return await asyncio.to_thread(action, *arguments)
    except AdaptError as error:
        return error


class Model(Replica):
    """One replica, to which Ray Serve routes requests by the adapters that it holds."""

    def __init__(self, settings: Settings, repository: Any) -> None:
        async def fetch(version: str) -> Adapter:
            name, data = await _answered(repository.read.remote(version))
            return await asyncio.to_thread(read_adapter, data, Path(name))

        super().__init__(settings, fetch, RayMetrics())

        async def load(version: str) -> Held:
            return await self.load(version)

        self.hold = serve.multiplexed(load, max_num_models_per_replica=settings.max_adapters)


class _Routed:
    """The replicas of the model, each request to one that has its heaviest adapter."""

    def __init__(self, model: Any) -> None:
        self._model = model

    async def describe(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        try:
            found: tuple[Mapping[str, Spec], Mapping[str, Spec]]
            found = await self._model.describe.remote()
        except (RayError, RayServeException) as error:
            raise ReplicaDiedError from error
        return found

    async def infer(
        self,
        feeds: Mapping[str, Array],
        datatypes: Mapping[str, str],
        outputs: Sequence[str],
        blend: Mapping[str, float],
    ) -> Result:
        handle = self._model
        if blend:
            heaviest = max(blend, key=lambda version: abs(blend[version]))
            handle = handle.options(multiplexed_model_id=heaviest)
        answer = handle.infer.remote(feeds, datatypes, outputs, blend)
        try:
            result: Result = await answer
        except asyncio.CancelledError:
            answer.cancel()
            raise
        except BackPressureError as error:
            raise RequestError("too many requests", hint="try later", status=503) from error
        except (RayActorError, RayServeException) as error:
            raise ReplicaDiedError from error
        return result


class _Remote:
    """The repository, as a gateway asks for it."""

    def __init__(self, repository: Any) -> None:
        self._repository = repository
        self._me = uuid.uuid4().hex

    async def news(self, under_way: int) -> News:
        found: News = await _answered(self._repository.news.remote(self._me, under_way))
        return found

    async def load(self, name: str) -> None:
        await _answered(self._repository.load.remote(name))

    async def unload(self, name: str) -> None:
        await _answered(self._repository.unload.remote(name))

    async def point(self, name: str, adapter: str) -> None:
        await _answered(self._repository.point.remote(name, adapter))


async def _answered(answer: Any) -> Any:
    """What the repository answers; an error that it returns is raised."""
    try:
        found = await answer
    except (RayError, RayServeException) as error:
        raise RequestError(
            "the repository of adapters is started anew", hint="try again", status=503
        ) from error
    if isinstance(found, AdaptError):
        raise found
    return found


class Front(Gateway):
    """A gateway in a process of its own, which asks the repository for news."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, model: Any, repository: Any
    ) -> None:
        access = read_access(settings.token_file)
        super().__init__(settings, _Routed(model), _Remote(repository), RayMetrics(), access)
        if settings.access_log:
            open_access_log(settings.access_log)
        await self.start()
        self._watch = asyncio.create_task(self._ask_always())

    async def _ask_always(self) -> None:
        while True:
            await asyncio.sleep(_STOPPING_S if self.stopping else self.settings.poll_s)
            with contextlib.suppress(RequestError):  # the repository is started anew
                await self.refresh()


def _api() -> Any:
    def front() -> Gateway:
        replica: Any = serve.get_replica_context()
        gateway: Gateway = replica.servable_object
        return gateway

    return api(front, names=False)
