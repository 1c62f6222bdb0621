"""What stands between clients and replicas: names become versions, failures become answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.batcher import Result
from onnx_adapt.serve.choice import Blend
from onnx_adapt.serve.metrics import Metrics
from onnx_adapt.serve.protocol import InferRequest, Spec
from onnx_adapt.serve.repository import Entry
from onnx_adapt.serve.settings import Settings

_TRIES = 4
"""A replica may die, and a version go, under a request; running it again is harmless."""


class ReplicaDiedError(RequestError):
    """The replica that had a request is no more; another one may take it."""

    def __init__(self) -> None:
        super().__init__("the replica died", hint="try again", status=503)


class Replicas(Protocol):
    """The replicas of the model, wherever they are."""

    async def describe(self) -> tuple[Mapping[str, Spec], Mapping[str, Spec]]:
        """The inputs and outputs of the model.

        Raises:
            ReplicaDiedError: If none answers.
        """

    async def infer(
        self,
        feeds: Mapping[str, Array],
        datatypes: Mapping[str, str],
        outputs: Sequence[str],
        blend: Mapping[str, float],
    ) -> Result:
        """Run the model with a blend of versions; empty for the base.

        Raises:
            ReplicaDiedError: If the replica dies meanwhile.
        """


@dataclass(frozen=True, slots=True)
class News:
    """What the repository tells gateways.

    Attributes:
        entries: What there is, by name.
        stopping: Whether the server ends, and new requests must be refused.
    """

    entries: Mapping[str, Entry]
    stopping: bool = False


class Versions(Protocol):
    """The repository, wherever it is."""

    async def news(self, under_way: int) -> News:
        """What a gateway should know, for how many requests it has to answer yet.

        -1 means that it still takes new ones.
        """

    async def load(self, name: str) -> None:
        """Check an adapter's file again, and serve it.

        Raises:
            AdaptError: If there is none, or it is refused.
        """

    async def unload(self, name: str) -> None:
        """Serve an adapter no more.

        Raises:
            AdaptError: If there is none.
        """


class Gateway:
    """Knows what there is, and asks replicas of the model.

    Args:
        settings: What was said about the server.
        replicas: What runs the model.
        versions: What knows which version of which adapter is served.
        metrics: What counts the answers.

    Attributes:
        inputs: The inputs of the model, once `start` has returned.
        outputs: Its outputs.
        entries: The adapters, by name.
        under_way: How many requests are not answered yet.
        stopping: Whether new requests are refused, because the server ends.
    """

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]
    entries: Mapping[str, Entry]

    def __init__(
        self, settings: Settings, replicas: Replicas, versions: Versions, metrics: Metrics
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.under_way = 0
        self.stopping = False
        self._replicas = replicas
        self._versions = versions

    async def start(self) -> None:
        """Learn what there is."""
        self.inputs, self.outputs = await self._replicas.describe()
        await self.refresh()

    async def refresh(self) -> None:
        """Learn which versions are served now, and whether the server stops."""
        news = await self._versions.news(self.under_way if self.stopping else -1)
        self.entries = news.entries
        self.stopping = self.stopping or news.stopping

    async def ready(self) -> bool:
        """Whether requests are taken, and some replica answers."""
        if self.stopping:
            return False
        try:
            await asyncio.wait_for(self._replicas.describe(), 5)
        except (asyncio.TimeoutError, ReplicaDiedError):
            return False
        return True

    async def load(self, name: str) -> None:
        """Check an adapter's file again, and serve it."""
        try:
            await self._versions.load(name)
        finally:
            await self.refresh()

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, until it is loaded."""
        try:
            await self._versions.unload(name)
        finally:
            await self.refresh()

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
            except ReplicaDiedError as error:
                problem = error
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
        answer = self._replicas.infer(
            request.feeds, request.datatypes, request.outputs, versions
        )
        try:
            return await asyncio.wait_for(answer, max(seconds, 0))
        except asyncio.TimeoutError as error:
            limit = self.settings.timeout_s
            raise RequestError(
                f"no answer within {limit:g} s", hint="send less at once", status=504
            ) from error


def _said(versions: Mapping[str, float]) -> str:
    if list(versions.values()) == [1]:
        return next(iter(versions))
    return json.dumps(versions) if versions else ""
