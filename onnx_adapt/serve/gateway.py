"""What stands between clients and replicas: names become versions, failures become answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, RayServeException

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.batcher import Result
from onnx_adapt.serve.choice import Blend
from onnx_adapt.serve.protocol import InferRequest, Spec
from onnx_adapt.serve.repository import Entry
from onnx_adapt.serve.settings import Settings

_TRIES = 4
"""A replica may die, and a version go, under a request; running it again is harmless."""
_BUCKETS_MS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]


class Gateway:
    """Knows what there is, and asks replicas of the model.

    Attributes:
        settings: What was said about the server.
        inputs: The inputs of the model.
        outputs: Its outputs.
        entries: The adapters, by name.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, settings: Settings, model: Any, repository: Any
    ) -> None:
        self.settings = settings
        self._model = model
        self._repository = repository
        self.inputs: Mapping[str, Spec]
        self.outputs: Mapping[str, Spec]
        self.entries: Mapping[str, Entry]
        self.inputs, self.outputs = await model.describe.remote()
        self.entries = await repository.entries.remote()
        self._watch = asyncio.create_task(self._refresh_always())
        tags: Any = ("adapter", "status")
        self._requests = metrics.Counter(
            "onnx_adapt_requests", "Inference requests that were answered.", tag_keys=tags
        )
        self._latency = metrics.Histogram(
            "onnx_adapt_latency_ms",
            "Milliseconds from the first byte of a request to its answer.",
            boundaries=_BUCKETS_MS,
            tag_keys=("adapter",),
        )

    async def _refresh_always(self) -> None:
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                await self.refresh()
            except (RayError, RayServeException):  # it is started anew: ask again
                continue

    async def refresh(self) -> None:
        """Learn which versions are served now."""
        self.entries = await self._repository.entries.remote()

    async def ready(self) -> bool:
        """Whether some replica answers."""
        try:
            await asyncio.wait_for(_reply(self._model.describe.remote()), 5)
        except (asyncio.TimeoutError, RayError, RayServeException):
            return False
        return True

    async def load(self, name: str) -> None:
        """Check an adapter's file again, and serve it."""
        await self._change(self._repository.load.remote(name))

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, until it is loaded."""
        await self._change(self._repository.unload.remote(name))

    async def _change(self, asked: Any) -> None:
        problem = await asked
        await self.refresh()
        if problem is not None:
            raise problem

    def version(self, name: str) -> str:
        """The version of an adapter that is served.

        Raises:
            AdapterNotFoundError: If none is.
        """
        entry = self.entries.get(name)
        if entry is None or not entry.version:
            why = f" is not served: {entry.reason}" if entry else " is not in the repository"
            raise AdapterNotFoundError(
                f"adapter {name!r}{why}",
                hint="`POST /v2/repository/index` lists what there is",
            )
        return entry.version

    async def infer(self, request: InferRequest, blend: Blend) -> tuple[str, dict[str, Array]]:
        """Run the model.

        Returns:
            What was active, in the words of the parameter `adapter` but by version; and
            the outputs.

        Raises:
            RequestError: If it cannot be done now, or took too long.
            AdaptError: If it cannot be done so.
        """
        if len(blend) > self.settings.max_adapters:
            raise RequestError(
                f"the blend has {len(blend)} adapters; a replica holds at most "
                f"{self.settings.max_adapters}",
                hint="blend fewer, or raise --max-adapters",
            )
        deadline = time.monotonic() + self.settings.timeout_s
        problem: AdaptError | None = None
        for _ in range(_TRIES):
            versions = {self.version(name): weight for name, weight in blend.items()}
            try:
                result = await self._ask(request, versions, deadline - time.monotonic())
            except RayActorError:
                problem = RequestError("the replica died", hint="try again", status=503)
                continue
            if not isinstance(result, AdaptError):
                return _said(versions), result
            if not isinstance(result, AdapterNotFoundError):
                raise result
            problem = result
            await self.refresh()
        assert problem is not None
        raise problem

    async def _ask(
        self, request: InferRequest, versions: Mapping[str, float], seconds: float
    ) -> Result:
        handle = self._model
        if versions:  # the replica to prefer is the one that has the heaviest of them
            heaviest = max(versions, key=lambda version: abs(versions[version]))
            handle = handle.options(multiplexed_model_id=heaviest)
        answer = handle.infer.remote(
            request.feeds, request.datatypes, request.outputs, versions
        )
        try:
            result: Result = await asyncio.wait_for(_reply(answer), max(seconds, 0))
        except asyncio.TimeoutError as error:
            answer.cancel()
            limit = self.settings.timeout_s
            raise RequestError(
                f"no answer within {limit:g} s", hint="send less at once", status=504
            ) from error
        except BackPressureError as error:
            raise RequestError("too many requests", hint="try later", status=503) from error
        return result

    def count(self, adapter: str, status: int, seconds: float) -> None:
        """Count an inference request that was answered."""
        self._requests.inc(tags={"adapter": adapter, "status": str(status)})
        self._latency.observe(seconds * 1e3, tags={"adapter": adapter})


async def _reply(response: Any) -> Any:
    return await response


def _said(versions: Mapping[str, float]) -> str:
    if list(versions.values()) == [1]:
        return next(iter(versions))
    return json.dumps(versions) if versions else ""
