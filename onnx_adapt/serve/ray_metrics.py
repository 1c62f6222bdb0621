"""What a server on Ray counts: Ray collects it from all processes, and Prometheus from Ray."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ray.serve import metrics

from onnx_adapt.serve.metrics import (
    LATENCY,
    LATENCY_BUCKETS,
    MIXED,
    MIXED_BUCKETS,
    REQUESTS,
    SWAPS,
    Named,
)


class RayMetrics:
    """The metrics of one process, as Ray has them: `ray_` comes before each name."""

    def __init__(self) -> None:
        tags: Any = ("adapter", "status")
        self._requests = metrics.Counter(*REQUESTS, tag_keys=tags)
        self._latency = metrics.Histogram(*LATENCY, boundaries=LATENCY_BUCKETS)
        self._swaps = metrics.Counter(*SWAPS, tag_keys=("adapter",))
        self._mixed = metrics.Histogram(*MIXED, boundaries=MIXED_BUCKETS)
        self._named = Named()

    def answered(self, adapter: str, status: int, seconds: float) -> None:
        """Count an inference request that was answered."""
        self._requests.inc(tags={"adapter": self._named.label(adapter), "status": str(status)})
        self._latency.observe(seconds * 1e3)

    def loaded(self, adapter: str) -> None:
        """Count an adapter that was loaded into a replica."""
        self._swaps.inc(tags={"adapter": self._named.label(adapter)})

    def ran(self, adapters: int) -> None:
        """Count a batch, by how many different adapters it had."""
        self._mixed.observe(adapters)

    def keep(self, adapters: Collection[str]) -> None:
        """Do nothing: Ray drops no line of a metric, so each adapter keeps its place."""
