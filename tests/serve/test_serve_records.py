"""Requests have ids, and each leaves one line in the access log, and a span."""

import asyncio
import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Message

from onnx_adapt.errors import RequestError
from onnx_adapt.serve import records, tracing
from onnx_adapt.serve.access import ANYBODY
from onnx_adapt.serve.edge import Edge
from onnx_adapt.serve.held import Loads
from onnx_adapt.serve.metrics import PrometheusMetrics
from onnx_adapt.serve.records import note_adapter, open_access_log


class Free:
    """A gateway with nothing to do, as far as the edge asks it."""

    access, stopping, under_way = ANYBODY, False, 0

    class bodies:  # noqa: N801
        @staticmethod
        def share() -> Any:
            return contextlib.nullcontext()


async def counted(scope: Any, receive: Any, send: Any) -> None:
    """An application that asks for an adapter, and fails if told so."""
    note_adapter("fr")
    if scope["path"] == "/bug":
        raise ZeroDivisionError
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"12345"})


def asked(path: str = "/v2", given: str = "", **more: str) -> tuple[int, str]:
    """The status and the id of an answer."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    edge = Edge(counted, lambda: Free, names=True)  # type: ignore[arg-type,return-value]
    headers = [(b"x-request-id", given.encode())] if given else []
    headers += [(name.encode(), value.encode()) for name, value in more.items()]
    scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
    asyncio.run(edge(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])[b"x-request-id"].decode()


@pytest.fixture
def log(tmp_path: Path) -> Any:
    open_access_log(str(tmp_path / "access.log"))
    yield tmp_path / "access.log"
    for handler in list(records._access.handlers):
        records._access.removeHandler(handler)
        handler.close()
    records._access.setLevel(logging.NOTSET)
    records._access.propagate = True


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("given", ["7f3a-1", "00-4bf92f-01", "a" * 128])
def test_an_answer_has_the_id_of_its_request(given: str) -> None:
    assert asked(given=given) == (200, given)


@pytest.mark.parametrize("given", ["", "a" * 129, "two words", "a\nb", "\x1b[31m", "é"])
def test_an_id_that_fits_into_no_log_is_replaced(given: str) -> None:
    _, one = asked(given=given)
    _, other = asked(given=given)
    assert len(one) == len(other) == 32
    assert one != other


def test_each_request_leaves_a_line(log: Path) -> None:
    asked("/v2/models/fr/infer", "one")
    asked("/x" * 1000 + '"\n')
    one, other = lines(log)
    assert one.pop("time").endswith("+00:00")
    assert 0 <= one.pop("ms") < 1000
    path = "/v2/models/fr/infer"
    assert one == {"id": "one", "adapter": "fr", "path": path, "status": 200, "bytes": 5}
    assert len(other["path"]) == 300


def test_a_fault_is_logged_under_its_id_and_told_without_detail(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert asked("/bug", "seven") == (500, "seven")
    assert "request seven failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert [(line["id"], line["status"]) for line in lines(log)] == [("seven", 500)]


def test_a_log_that_is_moved_away_begins_anew_and_one_that_is_lost_fails_no_request(
    log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked("/1")
    log.rename(log.with_suffix(".1"))
    asked("/2")
    assert [line["path"] for line in lines(log)] == ["/2"]
    log.unlink()
    log.mkdir()
    assert asked("/3")[0] == asked("/4")[0] == 200
    assert caplog.text.count("lines of the access log are lost") == 1


def test_a_log_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be written"):
        open_access_log(str(tmp_path / "none/access.log"))
    with pytest.raises(RequestError, match="cannot be written"):
        open_access_log(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("tests"))
    return exporter


def test_a_request_is_a_span_of_its_client_s_trace(spans: InMemorySpanExporter) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    asked("/v2/models/fr/infer", "one", traceparent=f"00-{trace}-{parent}-01")
    (found,) = spans.get_finished_spans()
    assert found.parent is not None
    assert (f"{found.context.trace_id:032x}", f"{found.parent.span_id:016x}") == (
        trace,
        parent,
    )
    assert (found.name, found.kind.name, found.status.is_ok) == ("GET", "SERVER", True)
    assert dict(found.attributes or {}) == {
        "url.path": "/v2/models/fr/infer",
        "onnx_adapt.request_id": "one",
        "onnx_adapt.adapter": "fr",
        "http.response.status_code": 200,
    }


def test_the_span_of_a_fault_says_so_and_has_no_parent_without_a_client(
    spans: InMemorySpanExporter,
) -> None:
    asked("/bug", traceparent="nonsense")
    (found,) = spans.get_finished_spans()
    assert (found.parent, found.status.status_code.name) == (None, "ERROR")


def test_loading_an_adapter_is_a_span_inside(
    spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(version: str) -> Path:
        return Path(version)

    loads = Loads(fetch, lambda *_: None, lambda *_: None, PrometheusMetrics())

    async def load() -> None:
        with tracing.request_span("POST", {}, {}):
            await loads("fr@1")

    asyncio.run(load())
    inner, outer = spans.get_finished_spans()
    assert (inner.name, outer.name) == ("load adapter", "POST")
    assert inner.parent == outer.context
    monkeypatch.setattr(tracing, "_TRACER", None)  # the extra is not installed
    asyncio.run(load())
    assert asked(given="7") == (200, "7")
    assert len(spans.get_finished_spans()) == 2
