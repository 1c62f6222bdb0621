"""Requests for models: each is counted, and so many for one adapter may be under way."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

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
        self._under_way: Counter[str] = Counter()

    @contextlib.contextmanager
    def share(self) -> Iterator[Callable[[Sequence[str]], None]]:
        """What a request calls with the adapters it needs, for as long as the block lasts.

        Raises:
            RequestError: That call, if as many as may be for one of them are under way.
        """
        taken: list[str] = []

        def take(names: Sequence[str]) -> None:
            for name in names:
                if 0 < self._most <= self._under_way[name]:
                    what = f"adapter {name!r}" if name else "the base"
                    raise RequestError(
                        f"{self._most} requests for {what} are under way",
                        hint="try later",
                        status=429,
                    )
            self._under_way.update(names)
            taken.extend(names)

        try:
            yield take
        finally:
            self._under_way -= Counter(taken)  # which forgets those that are at 0


class Asking:
    """A request for a model, while it is answered.

    Args:
        version: The version of an adapter that is served.
        take: Takes the share that the request has of each adapter's quota.

    Attributes:
        label: What it is counted under; names that clients make up would have no end.
    """

    def __init__(
        self, version: Callable[[str], str], take: Callable[[Sequence[str]], None]
    ) -> None:
        self._version = version
        self._take = take
        self.label = "unknown"

    def choose(self, blend: Blend) -> None:
        """Say which adapters are asked for.

        Raises:
            AdapterNotFoundError: If one is not served.
            RequestError: If too many requests for one of them are under way.
        """
        adapters = {self._version(name).rpartition("@")[0] for name in blend}
        self.label = "blend" if len(blend) > 1 else next(iter(blend), "base")
        self._take(sorted(adapters) or [""])


@contextlib.contextmanager
def counting(asking: Asking, answered: Callable[[str, int, float], None]) -> Iterator[Asking]:
    """Answer a request for a model inside the block, and count what became of it.

    Args:
        asking: The request.
        answered: Counts it, by its label, its status, and the seconds that it took.
    """
    began, status = time.monotonic(), GONE
    try:
        yield asking
        status = 200
    except AdaptError as error:
        status = status_of(error)
        raise
    except Exception:
        status = 500
        raise
    finally:
        answered(asking.label, status, time.monotonic() - began)


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
