"""Spans of OpenTelemetry: of each request, and of what takes long in it.

They go where its SDK is told to send them. Without the library, or without an SDK, there are
none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:  # the extra is not installed
    _TRACER: Any = None
else:
    _TRACER = trace.get_tracer("onnx_adapt")

_NOTHING = contextlib.nullcontext()


@functools.cache
def _is_wanted(tracer: Any) -> bool:
    """Whether anybody hears of a tracer's spans: found out once, with the first request.

    Spans that nobody hears of cost as much as others.
    """
    if tracer is None or not isinstance(tracer, trace.ProxyTracer):
        return tracer is not None
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def span(name: str, attributes: Mapping[str, str]) -> contextlib.AbstractContextManager[Any]:
    """A part of a request, inside a block.

    Args:
        name: What is done.
        attributes: What is known of it.
    """
    if not _is_wanted(_TRACER):
        return _NOTHING
    found: contextlib.AbstractContextManager[Any]
    found = _TRACER.start_as_current_span(name, attributes=attributes)
    return found


def request_span(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
) -> contextlib.AbstractContextManager[Any]:
    """A whole request, inside the block, as a part of what its client does.

    Args:
        name: What is asked for.
        headers: Those of the request, of which `traceparent` tells the client's span.
        attributes: What is known of the request.

    Returns:
        What gives the span, or None if nobody wants it.
    """
    return _request_span(name, headers, attributes) if _is_wanted(_TRACER) else _NOTHING


@contextlib.contextmanager
def _request_span(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
) -> Iterator[Any]:
    with _TRACER.start_as_current_span(
        name,
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        attributes=attributes,
    ) as found:
        yield found if found.is_recording() else None


def finish(found: Any, attributes: Mapping[str, str | int], *, failed: bool) -> None:
    """Say how a request ended.

    Args:
        found: Its span, or None.
        attributes: What is known of the answer.
        failed: Whether the server is at fault.
    """
    if found is None:
        return
    found.set_attributes(attributes)
    if failed:
        found.set_status(trace.Status(trace.StatusCode.ERROR))
