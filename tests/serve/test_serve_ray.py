"""A server of two replicas on Ray: what it does not share with that of one process."""

import asyncio
import json
import os
import re
import signal
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from adapter_models import bumped
from serve_clients import Answer, Server, load, replicas, server_on_ray
from serve_stopping import outputs, told_to_end_while_busy
from session_adapters import BASE, X, adapted_file, adapter, close
from waiting import LONG, until

import onnx_adapt as oa

NAMES = ["fr", "de", "it", "es", "pt"]
GIVEN = {name: adapter(name, i, 1 + i) for i, name in enumerate(NAMES)}
TRUTH: dict[str | None, np.ndarray] = {None: BASE}
BACK = {"rollback": True}
TRUTH |= {name: bumped(X, item) for name, item in GIVEN.items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "adapters").mkdir()
    for name, item in GIVEN.items():
        oa.save_adapter(item, folder / f"adapters/{name}.safetensors")
    options = ["--replicas", "2", "--max-adapters", "3", "--batch-axis", "0"]
    options += ["--poll-s", "0.1", "--batch-wait-ms", "5"]
    with server_on_ray(adapted_file(folder), folder / "adapters", *options) as running:
        yield running


def right(answers: list[Answer]) -> list[str]:
    """The errors of those that failed; all others must be right."""
    for answer in answers:
        if answer.array is not None:
            assert close(answer.array, TRUTH[answer.adapter])
    return [answer.error for answer in answers if answer.error]


def test_mixed_adapters_get_their_own_answers_and_a_killed_replica_costs_none(
    served: Server,
) -> None:
    before = replicas(served)
    assert len(before) == 2
    requests = [(X, [None, *NAMES][i % 6]) for i in range(600)]

    def kill(count: int) -> None:
        if count == 200:
            os.kill(before[0], signal.SIGKILL)

    failed = right(asyncio.run(load(served.address, requests, answered=kill)))
    assert all(error[:3] in ("503", "504") for error in failed), failed[:3]
    assert len(failed) <= 100  # no more than were under way
    until(lambda: len(set(replicas(served)) - {before[0]}) == 2, served.said)
    assert right(asyncio.run(load(served.address, requests[:100]))) == []


def exported(served: Server, pattern: str) -> list[float]:
    """The values of the metrics that a pattern matches."""
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=LONG) as response:
        found = re.findall(pattern + r".* (\S+)$", response.read().decode(), re.MULTILINE)
    return [float(value) for value in found]


def test_ray_exports_the_metrics_and_batches_hold_more_than_two_adapters(
    served: Server,
) -> None:
    wanted = [
        'ray_onnx_adapt_requests_total{.*adapter="fr".*status="200"',
        "ray_onnx_adapt_latency_ms_bucket{",
        'ray_onnx_adapt_swaps_total{.*adapter="de"',
    ]
    until(lambda: all(any(exported(served, p)) for p in wanted), served.said)
    batches = "ray_onnx_adapt_batch_adapters_"
    few = sum(exported(served, batches + 'bucket{.*le="2.0"'))
    assert 0 < few < sum(exported(served, batches + "count{"))


def test_an_alias_is_set_asked_for_and_rolled_back(served: Server) -> None:
    load_path = f"http://{served.address}/v2/repository/models/x@live/load"
    for name, change in (("fr", {"adapter": "fr"}), ("de", {"adapter": "de"}), ("fr", BACK)):
        body = json.dumps({"parameters": change}).encode()
        urllib.request.urlopen(load_path, body, timeout=LONG).close()
        (answer,) = asyncio.run(load(served.address, [(X, "x@live")]))
        assert answer.active.partition("@")[0] == name
        assert close(answer.array, TRUTH[name])


def test_a_busy_server_on_ray_that_is_told_to_end_answers_what_it_has(served: Server) -> None:
    """Ends the server of this module, so it comes last."""
    tensor = {"name": "x", "datatype": "FP32", "shape": list(X.shape), "data": X.tolist()}
    body = json.dumps({"inputs": [tensor], "parameters": {"adapter": "fr"}}).encode()
    for answer in told_to_end_while_busy(served, signal.SIGTERM, body):
        assert close(outputs(answer), TRUTH["fr"])
