"""Spans of OpenTelemetry: of each request, and of what takes long in it.

They go where its SDK is told to send them. Without the library, or without an SDK, there are
none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:  # the extra is not installed
    _TRACER: Any = None
else:
    _TRACER = trace.get_tracer("onnx_adapt")


def span(name: str, attributes: Mapping[str, str]) -> contextlib.AbstractContextManager[Any]:
    """A part of a request, inside a block.

    Args:
        name: What is done.
        attributes: What is known of it.
    """
    if _TRACER is None:
        return contextlib.nullcontext()
    found: contextlib.AbstractContextManager[Any]
    found = _TRACER.start_as_current_span(name, attributes=attributes)
    return found


@contextlib.contextmanager
def request_span(
    name: str, headers: Mapping[str, str], attributes: Mapping[str, str]
) -> Iterator[Any]:
    """A whole request, inside the block, as a part of what its client does.

    Args:
        name: What is asked for.
        headers: Those of the request, of which `traceparent` tells the client's span.
        attributes: What is known of the request.

    Yields:
        The span, or None if nobody wants it.
    """
    if _TRACER is None:
        yield None
        return
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
