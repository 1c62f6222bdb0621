"""What stands between clients and replicas: names become versions, failures become answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.access import ANYBODY, Access
from onnx_adapt.serve.aliases import read_change
from onnx_adapt.serve.batcher import Result
from onnx_adapt.serve.bodies import Bodies
from onnx_adapt.serve.choice import Blend
from onnx_adapt.serve.counting import Asking, Counted, Quotas
from onnx_adapt.serve.metrics import NO_ADAPTERS, Metrics
from onnx_adapt.serve.protocol import InferRequest, Spec
from onnx_adapt.serve.records import note_adapter
from onnx_adapt.serve.repository import Entry
from onnx_adapt.serve.settings import Settings
from onnx_adapt.serve.tracing import span
from onnx_adapt.serve.waiting import within

BASE_VERSION = "1"
"""The version of the base; for an adapter it means whichever is served."""

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

    async def point(self, name: str, adapter: str) -> None:
        """Let an alias mean an adapter, or with '' what it meant before.

        Raises:
            AdaptError: If that is not served, or it meant nothing before.
        """


class Gateway:
    """Knows what there is, and asks replicas of the model.

    Args:
        settings: What was said about the server.
        replicas: What runs the model.
        versions: What knows which version of which adapter is served.
        metrics: What counts the answers.
        access: Who may use the server.

    Attributes:
        base: What the base is called.
        inputs: The inputs of the model, once `start` has returned.
        outputs: Its outputs.
        entries: The adapters, by name.
        counted: What was answered, by adapter; those that are gone are forgotten.
        bodies: The memory that the bodies of requests have.
        under_way: How many requests are not answered yet.
        stopping: Whether new requests are refused, because the server ends.
    """

    inputs: Mapping[str, Spec]
    outputs: Mapping[str, Spec]

    def __init__(
        self,
        settings: Settings,
        replicas: Replicas,
        versions: Versions,
        metrics: Metrics,
        access: Access = ANYBODY,
    ) -> None:
        self.settings = settings
        self.base = settings.base
        self.metrics = metrics
        self.access = access
        self.entries: Mapping[str, Entry] = {}
        self.counted: dict[str, Counted] = {}
        self.bodies = Bodies(settings)
        self.under_way = 0
        self.stopping = False
        self._quotas = Quotas(settings.max_per_adapter)
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
        for name in self.counted.keys() - self.entries.keys() - NO_ADAPTERS:
            del self.counted[name]
        self.metrics.keep(self.entries)
        self.stopping = self.stopping or news.stopping

    async def ready(self) -> bool:
        """Whether requests are taken, and some replica answers."""
        if self.stopping:
            return False
        try:
            await within(5, self._replicas.describe())
        except (asyncio.TimeoutError, ReplicaDiedError):
            return False
        return True

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Check an adapter's file again, and serve it; or change what an alias means."""
        self._refuse_base(name)
        adapter = read_change(name, parameters)
        try:
            if adapter is None:
                await self._versions.load(name)
            else:
                await self._versions.point(name, adapter)
        finally:
            await self.refresh()

    async def unload(self, name: str) -> None:
        """Serve an adapter no more, until it is loaded; an alias is forgotten."""
        self._refuse_base(name)
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

    def request(self) -> Asking:
        """A request for a model, answered inside a block: it is counted, and has a quota."""
        return Asking(self.version, self._quotas, self.answered)

    def answered(self, adapter: str, status: int, seconds: float) -> None:
        """Count a request for a model that was answered."""
        note_adapter(adapter)
        self.metrics.answered(adapter, status, seconds)
        counted = self.counted.setdefault(adapter, Counted())
        total = counted.good if status == 200 else counted.bad
        total.count += 1
        total.seconds += seconds

    def named(self, model: str, version: str = "") -> str:
        """The version of a model that is served: the base, or an adapter.

        Raises:
            AdapterNotFoundError: If there is none, or another version is asked for.
        """
        present = BASE_VERSION
        if model != self.base:
            present = self.version(model).rpartition("@")[2]
        if version not in ("", present, BASE_VERSION):
            raise AdapterNotFoundError(
                f"{model!r} has no such version", hint=f"{present!r} is served"
            )
        return present

    def served(self) -> list[str]:
        """The models that can be asked for: the base, and the adapters that are served."""
        adapters = [name for name, entry in self.entries.items() if entry.version]
        return [self.base, *adapters]

    def states(self) -> list[dict[str, str]]:
        """The index of the repository extension of the protocol."""
        states = [{"name": self.base, "version": BASE_VERSION, "state": "READY"}]
        for entry in self.entries.values():
            state = "READY" if entry.version else "UNAVAILABLE"
            version = entry.version.rpartition("@")[2]
            states.append({"name": entry.name, "version": version, "state": state})
            if entry.reason:
                states[-1]["reason"] = entry.reason
        return states

    def _refuse_base(self, name: str) -> None:
        """Refuse to load or unload the base."""
        if name == self.base:
            raise RequestError("the base is loaded for as long as the server runs")

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
            versions = self._versions_of(blend)
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
        if isinstance(problem, AdapterNotFoundError):
            self._versions_of(blend)  # there is no such adapter any more, or
            raise RequestError(
                "an adapter was replaced each time before it was loaded",
                hint="try again",
                status=503,
            ) from problem
        raise problem

    def _versions_of(self, blend: Blend) -> dict[str, float]:
        """A blend of versions; two names may mean the same."""
        versions: dict[str, float] = {}
        for name, weight in blend.items():
            version = self.version(name)
            versions[version] = versions.get(version, 0) + weight
        return versions

    async def _ask(
        self, request: InferRequest, versions: Mapping[str, float], seconds: float
    ) -> Result:
        answer = self._replicas.infer(
            request.feeds, request.datatypes, request.outputs, versions
        )
        try:
            with span("run model", {"onnx_adapt.version": _said(versions)}):
                return await within(max(seconds, 0), answer)
        except asyncio.TimeoutError as error:
            limit = self.settings.timeout_s
            raise RequestError(
                f"no answer within {limit:g} s", hint="send less at once", status=504
            ) from error


def _said(versions: Mapping[str, float]) -> str:
    if list(versions.values()) == [1]:
        return next(iter(versions))
    return json.dumps(versions) if versions else ""
