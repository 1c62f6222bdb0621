"""A server on loopback, asked by NVIDIA's client and by curl's likes; one for all tests."""

import asyncio
import gzip
import json
import re
import select
import socket
import subprocess
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from adapter_models import bumped
from serve_clients import PROGRAM, Answer, Server, load, server
from session_adapters import BASE, X, adapted_file, adapter, close
from waiting import LONG, until

import onnx_adapt as oa

NAMES = ["fr", "de", "it", "es", "pt"]
GIVEN = {name: adapter(name, i, 1 + i) for i, name in enumerate(NAMES)}
TRUTH: dict[str | None, np.ndarray] = {None: BASE}
TRUTH |= {name: bumped(X, item) for name, item in GIVEN.items()}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "adapters").mkdir()
    suffixes = ("safetensors", "onnx_adapter", "npz")
    for i, (name, item) in enumerate(GIVEN.items()):
        oa.save_adapter(item, folder / f"adapters/{name}.{suffixes[i % 3]}")
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Server]:
    options = ["--max-adapters", "3", "--batch-axis", "0"]
    options += ["--timeout-s", "10", "--max-body-mb", "0.5", "--poll-s", "0.1"]
    options += ["--batch-wait-ms", "5"]
    with server(adapted_file(folder), folder / "adapters", *options) as running:
        yield running


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[Any]:
    limits = {"connection_timeout": LONG, "network_timeout": LONG}
    with triton.InferenceServerClient(served.address, **limits) as client:
        yield client


def asked(served: Server, path: str, body: bytes | None = None, **headers: str) -> Any:
    """Status and JSON of a plain HTTP request."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(f"http://{served.address}/{path}", body, names)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def document(x: np.ndarray = X, **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.tolist()}
    return json.dumps({"inputs": [tensor], **more}).encode()


def output(answer: Any) -> np.ndarray:
    status, found = answer
    assert status == 200, found
    (tensor,) = found["outputs"]
    return np.array(tensor["data"], np.float32).reshape(tensor["shape"])


def states(served: Server) -> dict[str, dict]:
    _, index = asked(served, "v2/repository/index", b"")
    return {entry["name"]: entry for entry in index}


def random_load(
    served: Server,
    count: int,
    names: list[str | None],
    answered: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """So many requests of some rows each, a hundred at a time; wrong answers fail."""
    rows = [RNG.choice(6, RNG.integers(1, 4), replace=False) for _ in range(count)]
    chosen = [names[i] for i in RNG.integers(0, len(names), count)]
    requests = [(X[r], name) for r, name in zip(rows, chosen, strict=True)]
    answers = asyncio.run(load(served.address, requests, answered=answered))
    for answer, r in zip(answers, rows, strict=True):
        if answer.array is not None and answer.adapter in TRUTH:
            assert close(answer.array, TRUTH[answer.adapter][r]), answer
    return answers


def test_the_server_tells_what_it_is_and_has(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    about = client.get_server_metadata()
    assert about["extensions"] == ["binary_tensor_data", "model_repository"]
    for name in ("adapted", "fr"):
        assert client.is_model_ready(name)
        found = client.get_model_metadata(name)
        assert found["name"] == name
        assert found["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
        assert found["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}]
        assert client.is_model_ready(name, found["versions"][0])
    assert not client.is_model_ready("xx")
    assert not client.is_model_ready("fr", "000000000000")
    index = client.get_model_repository_index()
    assert [entry["name"] for entry in index] == ["adapted", *sorted(NAMES)]
    assert {entry["state"] for entry in index} == {"READY"}


def test_the_first_page_tells_a_person_and_a_program_what_this_is(served: Server) -> None:
    for path in ("", "-/"):
        status, found = asked(served, path)
        assert (status, found["name"], found["model"]) == (200, "onnx-adapt", "adapted")
        assert found["adapters"] >= 5
        assert "/v2/models/{model}/infer" in found["addresses"]
        assert "/v1/embeddings" not in found["addresses"]
        for address, what in found["addresses"].items():
            if what.startswith("GET") and "{" not in address:
                with urllib.request.urlopen(f"http://{served.address}{address}") as response:
                    assert response.status == 200
    request = urllib.request.Request(
        f"http://{served.address}/", headers={"Accept": "text/html"}
    )
    with urllib.request.urlopen(request, timeout=LONG) as response:
        assert response.headers["content-type"].startswith("text/html")
        assert '<a href="/v2/models">' in response.read().decode()


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("name", ["fr", None])
def test_triton_s_client_gets_what_a_session_computes(
    client: Any, name: str | None, binary: bool
) -> None:
    tensor = triton.InferInput("x", [6, 4], "FP32")
    tensor.set_data_from_numpy(X, binary_data=binary)
    wanted = [triton.InferRequestedOutput("y", binary_data=binary)]
    by_parameter = {"parameters": {"adapter": name}} if name else {}
    for model, more in ((name or "adapted", {}), ("adapted", by_parameter)):
        result = client.infer(model, [tensor], outputs=wanted, request_id="7", **more)
        assert close(result.as_numpy("y"), TRUTH[name])
        answer = result.get_response()
        assert (answer["id"], answer["model_name"]) == ("7", model)
        assert answer["parameters"]["adapter"].partition("@")[0] == (name or "")


def test_the_header_of_ray_s_router_names_an_adapter_too(served: Server) -> None:
    header = {"serve_multiplexed_model_id": "de"}
    found = asked(served, "v2/models/adapted/infer", document(), **header)
    assert close(output(found), TRUTH["de"])


def test_what_clients_of_other_servers_send_is_taken(served: Server) -> None:
    foreign = {"priority": 1, "timeout": 9, "content_type": "x", "headers": {}}
    for path, more in (
        ("fr", {"parameters": foreign, "id": None, "outputs": None}),
        ("fr/versions/1", {"parameters": None}),
        ("adapted", {"parameters": {"adapter": "fr"} | foreign}),
    ):
        body = document(**more)
        assert close(output(asked(served, f"v2/models/{path}/infer", body)), TRUTH["fr"])
    body = document(parameters={"adapter": "adapted"})
    assert close(output(asked(served, "v2/models/adapted/infer", body)), BASE)
    for coding, packed in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        found = asked(
            served, "v2/models/fr/infer", packed(document()), content_encoding=coding
        )
        assert close(output(found), TRUTH["fr"])


def test_models_configurations_and_statistics_are_told(client: Any, served: Server) -> None:
    assert asked(served, "v2/models") == (200, {"models": ["adapted", *sorted(NAMES)]})
    config = client.get_model_config("it")
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}]
    for path, count in (("it", 1), ("adapted", 1)):
        before, after = (counts(client, path) for _ in _asked_between(served, path))
        assert after[0] - before[0] == count
        assert after[1] > before[1]


def counts(client: Any, name: str) -> tuple[int, int]:
    (stats,) = client.get_inference_statistics(name)["model_stats"]
    return tuple(stats["inference_stats"]["success"].values())


def _asked_between(served: Server, name: str) -> Iterator[None]:
    yield
    assert asked(served, f"v2/models/{name}/infer", document())[0] == 200
    yield


def test_a_blend_equals_that_of_a_session(served: Server, folder: Path) -> None:
    blend = {"fr": 0.7, "de": -0.3, "es": 1.5}
    session = oa.AdapterSession(folder / "adapted.onnx", GIVEN)
    expected = session.run({"x": X}, adapter=blend)["y"]
    for value in (blend, json.dumps(blend)):
        body = document(parameters={"adapter": value})
        assert close(output(asked(served, "v2/models/adapted/infer", body)), expected)


def test_a_hundred_clients_of_mixed_adapters_all_get_their_own_answer(
    served: Server, folder: Path
) -> None:
    """More adapters than replicas hold, and a blend; every answer is a session's."""
    blend = json.dumps({"fr": 0.5, "it": 0.5})
    session = oa.AdapterSession(folder / "adapted.onnx", GIVEN)
    TRUTH[blend] = session.run({"x": X}, adapter=json.loads(blend))["y"]
    answers = random_load(served, 800, [None, *NAMES, blend])
    assert [answer.error for answer in answers if answer.error] == []
    spent = sorted(answer.milliseconds for answer in answers)
    print(f"median {spent[400]:.0f} ms, 99 % {spent[792]:.0f} ms")


RAW = {"Inference_Header_Content_Length": "10"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "message"),
    [
        ("models/xx/infer", document(), {}, 404, "adapter 'xx' is not in the repository"),
        ("models/..%2Ffr/infer", document(), {}, 404, ""),
        ("models/fr/infer", document(parameters={"adapter": "de"}), {}, 400, "several"),
        ("models/fr/infer", document(parameters={"adaptor": "x"}), {}, 400, "'adaptor'"),
        (
            "models/adapted/infer",
            document(parameters={"adapter": "../../etc/passwd"}),
            {},
            400,
            "no name of an adapter",
        ),
        (
            "models/adapted/infer",
            document(parameters={"adapter": dict.fromkeys(NAMES, 0.2)}),
            {},
            400,
            "at most 3",
        ),
        ("models/fr/infer", document(X[:, :3]), {}, 400, r"shape [-1, 4], not [6, 3]"),
        ("models/fr/infer", document(np.tile(X, (11, 1))), {}, 400, "66 rows"),
        ("models/fr/infer", document(outputs=[{"name": "z"}]), {}, 400, "no output"),
        ("models/fr/infer", b"{", {}, 400, "no JSON"),
        ("models/fr/infer", b"{}", {}, 400, "no `inputs`"),
        ("models/fr/infer", document(), RAW, 400, "no JSON"),
        ("models/fr/infer", document(), {"Content_Encoding": "br"}, 415, "'br'"),
        ("models/fr/infer", b"no", {"Content_Encoding": "gzip"}, 400, "unpacked"),
        (
            "models/fr/infer",
            gzip.compress(document())[:-9],
            {"Content_Encoding": "gzip"},
            400,
            "too early",
        ),
        (
            "models/fr/infer",
            gzip.compress(b" " * 10**7),
            {"Content_Encoding": "gzip"},
            413,
            "more than 0.5 MB",
        ),
        ("models/fr/infer", b" " * 600_000, {}, 413, "more than 0.5 MB"),
        ("models/fr/versions/000000000000/infer", document(), {}, 404, "no such version"),
        ("models/fr", b"", {}, 405, "Method Not Allowed"),
        ("nothing", None, {}, 404, "Not Found"),
        ("repository/models/xx/load", b"", {}, 404, "no adapter 'xx'"),
        ("repository/models/adapted/unload", b"", {}, 400, "the base"),
        (
            "repository/models/fr/load",
            b'{"parameters": {"file:1/model.onnx": "AAAA"}}',
            {},
            400,
            "from the server's folder only",
        ),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_the_protocol(
    served: Server, path: str, body: bytes, headers: dict, status: int, message: str
) -> None:
    code, found = asked(served, f"v2/{path}", body, **headers)
    assert (code, list(found)) == (status, ["error"]), found
    assert message in found["error"]


def sent_slowly(served: Server, head: str, chunk: bytes, count: int, pause: float) -> bytes:
    """The start of the answer to a request whose body trickles in."""
    host, _, port = served.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=LONG) as connection:
        lines = f"POST /v2/models/fr/infer HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n"
        connection.sendall(lines.encode())
        for _ in range(count):
            connection.sendall(chunk)
            if select.select([connection], [], [], pause)[0]:
                break
        return connection.recv(1000)


def test_slow_clients_are_told_to_go_and_others_do_not_wait_for_them(served: Server) -> None:
    found: list[bytes] = []

    def crawl() -> None:
        found.append(sent_slowly(served, "Content-Length: 9000", b" ", 4, 0.2))

    threads = [threading.Thread(target=crawl) for _ in range(20)]
    for thread in threads:
        thread.start()
    assert close(output(asked(served, "v2/models/fr/infer", document())), TRUTH["fr"])
    assert found == []
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert {answer[:12] for answer in found} == {b"HTTP/1.1 408"}


def test_a_body_without_end_is_cut_off(served: Server) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = sent_slowly(served, "Transfer-Encoding: chunked", chunk, 20, 0.05)
    assert answer[:12] == b"HTTP/1.1 413"


def test_an_adapter_can_be_unloaded_and_loaded(client: Any, served: Server) -> None:
    client.unload_model("pt")
    assert not client.is_model_ready("pt")
    code, found = asked(served, "v2/models/pt/infer", document())
    assert code == 404
    assert "it was unloaded" in found["error"]
    client.load_model("pt")
    assert close(output(asked(served, "v2/models/pt/infer", document())), TRUTH["pt"])


def test_adapters_that_are_replaced_under_load_change_at_once_and_whole(
    served: Server, folder: Path
) -> None:
    """Every answer tells which version it is of, and is of it; bad files change nothing."""
    path = folder / "adapters/new.safetensors"
    truth: dict[str, np.ndarray] = {}
    seen: list[str] = []

    def drop(seed: int) -> None:
        item = adapter("new", seed)
        oa.save_adapter(item, path)
        before = seen[-1:]
        until(
            lambda: states(served).get("new", {}).get("version") not in (None, "", *before),
            served.said,
        )
        seen.append(states(served)["new"]["version"])
        truth[f"new@{seen[-1]}"] = bumped(X, item)

    drop(50)
    answers: list[Answer] = []
    dropped = threading.Event()

    def call() -> None:
        while not dropped.is_set():
            requests = [(X, "new")] * 100
            answers.extend(asyncio.run(load(served.address, requests, clients=20)))

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for seed in range(51, 55):
            drop(seed)
            path.write_bytes(b"bad")
            until(lambda: "reason" in states(served)["new"], served.said)
            assert states(served)["new"]["version"] == seen[-1]
            assert states(served)["new"]["state"] == "READY"
    finally:
        dropped.set()
        thread.join()
    assert [answer.error for answer in answers if answer.error] == []
    for answer in answers:
        assert close(answer.array, truth[answer.active])
    assert len({answer.active for answer in answers}) > 1
    assert "adapter 'new' is refused" in served.log.read_text(encoding="utf-8")
    path.unlink()
    until(lambda: asked(served, "v2/models/new")[0] == 404, served.said)


def point(served: Server, alias: str, **parameters: Any) -> tuple[int, Any]:
    body = json.dumps({"parameters": parameters}).encode()
    return asked(served, f"v2/repository/models/{alias}/load", body)


def test_an_alias_that_is_switched_under_load_changes_at_once_and_whole(
    served: Server,
) -> None:
    changes = {100: {"adapter": "de"}, 200: {"adapter": "fr"}, 300: {"rollback": True}}
    assert point(served, "x@live", adapter="fr") == (200, {})

    def switch(count: int) -> None:
        if count in changes:
            assert point(served, "x@live", **changes[count]) == (200, {})

    requests = [(X, "x@live")] * 400
    answers = asyncio.run(load(served.address, requests, clients=10, answered=switch))
    assert [answer.error for answer in answers if answer.error] == []
    for answer in answers:
        assert close(answer.array, TRUTH[answer.active.partition("@")[0]])
    active = [answer.active.partition("@")[0] for answer in answers]
    assert {*active[:90]} == {*active[220:290]} == {"fr"}
    assert {*active[120:190]} == {*active[-50:]} == {"de"}
    assert asked(served, "v2/models/x@live")[1]["name"] == "x@live"
    body = document(parameters={"adapter": {"x@live": 0.5, "de": 0.5}})
    assert close(output(asked(served, "v2/models/adapted/infer", body)), TRUTH["de"])
    status, found = point(served, "x@live", rollback=True)
    assert (status, list(found)) == (400, ["error"])
    assert asked(served, "v2/repository/models/x@live/unload", b"") == (200, {})
    assert asked(served, "v2/models/x@live")[0] == 404


def exported(served: Server, pattern: str) -> list[float]:
    """The values of the metrics that a pattern matches."""
    with urllib.request.urlopen(f"http://{served.metrics}/metrics", timeout=LONG) as response:
        found = re.findall(pattern + r".* (\S+)$", response.read().decode(), re.MULTILINE)
    return [float(value) for value in found]


def test_prometheus_finds_requests_latency_and_swaps_of_each_adapter(served: Server) -> None:
    wanted = [
        'onnx_adapt_requests_total{.*adapter="fr".*status="200"',
        'onnx_adapt_requests_total{.*adapter="unknown".*status="404"',
        'onnx_adapt_requests_total{.*adapter="blend".*status="200"',
        'onnx_adapt_swaps_total{.*adapter="de"',
    ]
    until(lambda: all(any(exported(served, p)) for p in wanted), served.said)
    assert exported(served, '.*adapter="xx"') == []


def test_requests_of_different_adapters_were_joined_into_one_batch(served: Server) -> None:
    """Ray Serve takes batches apart by what it routed by; then two are the most."""
    batches = "onnx_adapt_batch_adapters_"
    until(lambda: bool(exported(served, batches + "count")), served.said)
    few = sum(exported(served, batches + 'bucket{.*le="2.0"'))
    assert 0 < few < sum(exported(served, batches + "count"))


def refused(*arguments: Any) -> str:
    done = subprocess.run([PROGRAM, "serve", *arguments], capture_output=True, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    return done.stderr.decode()


def test_what_cannot_be_served_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    model, adapters = folder / "adapted.onnx", folder / "adapters"
    base = Path("models/dnsmos-p808.onnx").absolute()
    assert "has no slots" in refused(base, "--adapters", adapters)
    assert "no folder" in refused(model, "--adapters", tmp_path / "nowhere")
    assert "cannot" in refused(tmp_path / "m.onnx", "--adapters", adapters)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen" in refused(model, "--adapters", adapters, "--port", port)
