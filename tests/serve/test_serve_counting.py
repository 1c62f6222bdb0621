"""Requests are counted without end of lines, and a flood for one adapter leaves room."""

import asyncio
import contextlib
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from onnx_adapt.errors import AdapterNotFoundError, AdaptError, RequestError
from onnx_adapt.serve.counting import later, status_of
from onnx_adapt.serve.gateway import Gateway, News
from onnx_adapt.serve.metrics import PrometheusMetrics
from onnx_adapt.serve.protocol import InferRequest
from onnx_adapt.serve.repository import Entry
from onnx_adapt.serve.settings import Settings


class Folder:
    """What a gateway asks the repository."""

    def __init__(self) -> None:
        self.entries: Mapping[str, Entry] = MappingProxyType({})

    def put(self, *names: str) -> None:
        self.entries = {name: Entry(name, f"{name}@1") for name in names}

    async def news(self, under_way: int) -> News:
        return News(self.entries)


@pytest.fixture
def folder() -> Folder:
    return Folder()


def made(folder: Folder, most: int = 0) -> Gateway:
    settings = Settings("m.onnx", "adapters", max_per_adapter=most)
    gateway = Gateway(settings, None, folder, PrometheusMetrics())  # type: ignore[arg-type]
    asyncio.run(gateway.refresh())
    return gateway


def text(gateway: Gateway) -> str:
    assert isinstance(gateway.metrics, PrometheusMetrics)
    return gateway.metrics.text().decode()


def ask(gateway: Gateway, *names: str, error: object = None) -> None:
    with gateway.request() as asking:
        asking.choose(dict.fromkeys(names, 1.0))
        if error:
            raise error  # type: ignore[misc]


def test_a_flood_for_one_adapter_is_refused_and_others_are_not(folder: Folder) -> None:
    folder.put("fr", "de")
    gateway = made(folder, most=2)
    with gateway.request() as one, gateway.request() as other:
        one.choose({"fr": 1.0})
        other.choose({"fr": 0.5, "de": 0.5})
        for names in (["fr"], ["fr", "de"]):
            with pytest.raises(RequestError, match="2 requests for adapter 'fr'") as refused:
                ask(gateway, *names)
            assert status_of(refused.value) == 429
            assert later(429) == {"Retry-After": "1"}
        ask(gateway, "de")
        ask(gateway)
    ask(gateway, "fr")
    counted = gateway.counted
    assert (counted["fr"].good.count, counted["fr"].bad.count) == (2, 1)
    assert 'adapter="fr",status="429"} 1.0' in text(gateway)
    assert gateway._quotas._under_way == {}


def test_the_base_has_a_quota_too(folder: Folder) -> None:
    gateway = made(folder, most=1)
    with gateway.request() as asking:
        asking.choose({})
        with pytest.raises(RequestError, match="1 requests for the base"):
            ask(gateway)


def test_what_becomes_of_requests_is_counted(folder: Folder) -> None:
    folder.put("fr")
    gateway = made(folder)
    with pytest.raises(AdapterNotFoundError):
        ask(gateway, "made-up")
    for error in (ZeroDivisionError, asyncio.CancelledError, RequestError("no")):
        with contextlib.suppress(BaseException):
            ask(gateway, "fr", error=error)
    ask(gateway, "fr")
    for adapter, status in (("unknown", 404), *(("fr", s) for s in (500, 499, 400, 200))):
        assert f'adapter="{adapter}",status="{status}"}} 1.0' in text(gateway)
    assert "made-up" not in text(gateway)


def test_metrics_do_not_grow_with_adapters(folder: Folder) -> None:
    names = [f"a{i}" for i in range(500)]
    folder.put(*names)
    gateway = made(folder)
    for name in names:
        ask(gateway, name)
        gateway.metrics.loaded(name)
    assert text(gateway).count("onnx_adapt_requests_total{") == 101
    assert 'onnx_adapt_requests_total{adapter="other",status="200"} 400.0' in text(gateway)
    assert text(gateway).count("onnx_adapt_swaps_total{") == 101


def test_an_adapter_that_is_gone_leaves_no_line_and_its_place_is_another_s(
    folder: Folder,
) -> None:
    gateway = made(folder)
    for i in range(300):
        folder.put(f"a{i}")
        asyncio.run(gateway.refresh())
        ask(gateway, f"a{i}")
        gateway.metrics.loaded(f"a{i}")
    found = text(gateway)
    assert found.count("onnx_adapt_requests_total{") == 1
    assert 'adapter="a299"' in found
    assert "a298" not in found
    assert list(gateway.counted) == ["a299"]
    with gateway.request() as asking:  # it goes while a request for it is under way
        asking.choose({"a299": 1.0})
        folder.put("de")
        asyncio.run(gateway.refresh())
    asyncio.run(gateway.refresh())
    assert "a299" not in text(gateway)
    assert gateway.counted == {}


@pytest.mark.parametrize(("removed", "status"), [(False, 503), (True, 404)])
def test_an_adapter_that_is_replaced_each_time_is_asked_for_again(
    folder: Folder, removed: bool, status: int
) -> None:
    asked_for = []

    class Behind:
        """A replica for which every version is gone before it has read it."""

        async def infer(self, *given: object) -> AdapterNotFoundError:
            asked_for.append(given[3])
            folder.entries = {"fr": Entry("fr", f"fr@{len(asked_for) + 1}")}
            if removed and len(asked_for) == 4:
                folder.entries = {}
            return AdapterNotFoundError(f"adapter version {given[3]} is gone")

    folder.put("fr")
    gateway = made(folder)
    gateway._replicas = Behind()  # type: ignore[assignment]
    request = InferRequest("", None, {}, {}, (), frozenset(), all_binary=False)
    with pytest.raises(AdaptError) as refused:
        asyncio.run(gateway.infer(request, {"fr": 1.0}))
    assert status_of(refused.value) == status
    assert asked_for == [{f"fr@{i}": 1.0} for i in (1, 2, 3, 4)]
