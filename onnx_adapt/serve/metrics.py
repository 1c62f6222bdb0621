"""What a server counts, and how Prometheus reads it.

Counters have a label for the adapter. Histograms have none, or their number of lines would
be that of the adapters times that of the buckets.
"""

from __future__ import annotations

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


class PrometheusMetrics:
    """The metrics of one process, as the Prometheus text format has them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(*REQUESTS, ["adapter", "status"], registry=self._registry)
        self._latency = Histogram(*LATENCY, buckets=LATENCY_BUCKETS, registry=self._registry)
        self._swaps = Counter(*SWAPS, ["adapter"], registry=self._registry)
        self._mixed = Histogram(*MIXED, buckets=MIXED_BUCKETS, registry=self._registry)

    def answered(self, adapter: str, status: int, seconds: float) -> None:
        """Count an inference request that was answered."""
        self._requests.labels(adapter, str(status)).inc()
        self._latency.observe(seconds * 1e3)

    def loaded(self, adapter: str) -> None:
        """Count an adapter that was loaded."""
        self._swaps.labels(adapter).inc()

    def ran(self, adapters: int) -> None:
        """Count a batch, by how many different adapters it had."""
        self._mixed.observe(adapters)

    def text(self) -> bytes:
        """All of them, in the Prometheus text format."""
        return generate_latest(self._registry)
