"""What a server counts, and how Prometheus reads it.

Counters have a label for the adapter, for the first hundred that are asked for; the others
share one, or a server of many adapters would have as many lines. Histograms have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

REQUESTS = ("onnx_adapt_requests", "Inference requests that were answered.")
LATENCY = (
    "onnx_adapt_latency_ms",
    "Milliseconds from the first byte of a request to its answer.",
)
SWAPS = ("onnx_adapt_swaps", "Adapters loaded into a replica.")
MIXED = ("onnx_adapt_batch_adapters", "Different adapters in a batch, the base among them.")
"""Name and description of each metric."""

_MOST_NAMED = 100
"""Adapters that are counted under their own names."""

OTHER = "other"
"""What the others are counted under."""

NO_ADAPTERS = frozenset(("base", "blend", "unknown"))
"""What requests for no adapter that is known are counted under."""

LATENCY_BUCKETS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000]
MIXED_BUCKETS: list[float] = [1, 2, 4, 8, 16, 32, 64]


class Metrics(Protocol):
    """What is counted, wherever it is kept."""

    def answered(self, adapter: str, status: int, seconds: float) -> None:
        """Count an inference request that was answered."""

    def loaded(self, adapter: str) -> None:
        """Count an adapter that was loaded into a replica."""

    def ran(self, adapters: int) -> None:
        """Count a batch, by how many different adapters it had."""

    def keep(self, adapters: Collection[str]) -> None:
        """Forget all adapters but these, which are there."""


class Named:
    """The adapters that are counted under their own names.

    Example:
        >>> named = Named(most=1)
        >>> named.label("fr"), named.label("de"), named.label("base")
        ('fr', 'other', 'base')
    """

    def __init__(self, most: int = _MOST_NAMED) -> None:
        self._most = most
        self._names: set[str] = set()

    def label(self, adapter: str) -> str:
        """What an adapter is counted under."""
        if adapter in self._names or adapter in NO_ADAPTERS:
            return adapter
        if len(self._names) >= self._most:
            return OTHER
        self._names.add(adapter)
        return adapter

    def keep(self, adapters: Collection[str]) -> set[str]:
        """Give the places of those that are not among these to others; which they were."""
        gone = self._names.difference(adapters)
        self._names -= gone
        return gone


class PrometheusMetrics:
    """The metrics of one process, as the Prometheus text format has them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(*REQUESTS, ["adapter", "status"], registry=self._registry)
        self._latency = Histogram(*LATENCY, buckets=LATENCY_BUCKETS, registry=self._registry)
        self._swaps = Counter(*SWAPS, ["adapter"], registry=self._registry)
        self._mixed = Histogram(*MIXED, buckets=MIXED_BUCKETS, registry=self._registry)
        self._named = Named()
        self._statuses: set[str] = set()

    def answered(self, adapter: str, status: int, seconds: float) -> None:
        """Count an inference request that was answered."""
        adapter = self._named.label(adapter)
        self._requests.labels(adapter, str(status)).inc()
        self._statuses.add(str(status))
        self._latency.observe(seconds * 1e3)

    def loaded(self, adapter: str) -> None:
        """Count an adapter that was loaded."""
        self._swaps.labels(self._named.label(adapter)).inc()

    def ran(self, adapters: int) -> None:
        """Count a batch, by how many different adapters it had."""
        self._mixed.observe(adapters)

    def keep(self, adapters: Collection[str]) -> None:
        """Drop the lines of all adapters but these, which are there."""
        for adapter in self._named.keep(adapters):
            with contextlib.suppress(KeyError):  # it was never loaded
                self._swaps.remove(adapter)
            for status in self._statuses:
                with contextlib.suppress(KeyError):
                    self._requests.remove(adapter, status)

    def text(self) -> bytes:
        """All of them, in the Prometheus text format."""
        return generate_latest(self._registry)
