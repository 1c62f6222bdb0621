"""Requests for models: each is counted, and so many for one adapter may be under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from onnx_adapt.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdaptError,
    RequestError,
    RunError,
)
from onnx_adapt.serve.choice import Blend

GONE = 499
"""What is counted for a client that does not wait for its answer."""

_LATER = (429, 503)
"""The statuses with which a client is asked to come again."""


@dataclass(slots=True)
class Total:
    """How many requests there were, and the seconds that they took."""

    count: int = 0
    seconds: float = 0.0

    def described(self) -> dict[str, int]:
        """As the statistics extension of the protocol has it."""
        return {"count": self.count, "ns": int(self.seconds * 1e9)}


@dataclass(slots=True)
class Counted:
    """The requests of one adapter that this gateway answered."""

    good: Total = field(default_factory=Total)
    bad: Total = field(default_factory=Total)


class Quotas:
    """How many requests for each adapter may be under way, those that wait included.

    Args:
        most: That number; 0 is no limit.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: dict[str, int] = {}

    def take(self, names: Sequence[str]) -> None:
        """Take the share that a request has of each adapter's quota.

        Raises:
            RequestError: If as many as may be for one of them are under way.
        """
        for name in names:
            if 0 < self._most <= self._under_way.get(name, 0):
                what = f"adapter {name!r}" if name else "the base"
                raise RequestError(
                    f"{self._most} requests for {what} are under way",
                    hint="try later",
                    status=429,
                )
        for name in names:
            self._under_way[name] = self._under_way.get(name, 0) + 1

    def give_back(self, names: Sequence[str]) -> None:
        """Give back what was taken; adapters that nobody asks for are forgotten."""
        for name in names:
            left = self._under_way.pop(name) - 1
            if left:
                self._under_way[name] = left


class Asking:
    """A request for a model, answered inside the block: it is counted, and has a quota.

    Args:
        version: The version of an adapter that is served.
        quotas: The quotas of adapters.
        answered: Counts it, by its label, its status, and the seconds that it took.

    Attributes:
        label: What it is counted under; names that clients make up would have no end.
    """

    def __init__(
        self,
        version: Callable[[str], str],
        quotas: Quotas,
        answered: Callable[[str, int, float], None],
    ) -> None:
        self._version = version
        self._quotas = quotas
        self._answered = answered
        self._taken: Sequence[str] = ()
        self.label = "unknown"

    def choose(self, blend: Blend) -> None:
        """Say which adapters are asked for.

        Raises:
            AdapterNotFoundError: If one is not served.
            RequestError: If too many requests for one of them are under way.
        """
        adapters = {self._version(name).rpartition("@")[0] for name in blend}
        self.label = "blend" if len(blend) > 1 else next(iter(blend), "base")
        names = sorted(adapters) or [""]
        self._quotas.take(names)
        self._taken = names

    def __enter__(self) -> Asking:
        """Begin to answer it."""
        self._began = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Count what became of it."""
        self._quotas.give_back(self._taken)
        self._answered(self.label, _status(error), time.monotonic() - self._began)


def _status(error: BaseException | None) -> int:
    """What a request is counted as, by what it ended with."""
    if error is None:
        return 200
    if isinstance(error, AdaptError):
        return status_of(error)
    return 500 if isinstance(error, Exception) else GONE


def status_of(error: AdaptError) -> int:
    """The HTTP status that says what went wrong."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, AdapterNotFoundError):
        return 404
    return 400 if isinstance(error, AdapterError | RunError) else 500


def later(status: int) -> dict[str, str] | None:
    """The header that asks a client to come again, where a status asks for it."""
    return {"Retry-After": "1"} if status in _LATER else None
