"""Who may use a server: a bearer token and TLS, over HTTP and gRPC."""

import json
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from adapter_models import bumped
from disk_models import refused
from serve_clients import Server, free_port, server, server_on_ray
from session_adapters import FR, X, adapted_file, close
from waiting import LONG

import onnx_adapt as oa

TOKEN = "0123456789abcdef"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    adapted_file(folder)
    (folder / "adapters").mkdir()
    oa.save_adapter(FR, folder / "adapters/fr.npz")
    (folder / "token").write_text(f"{TOKEN}\n", encoding="ascii")
    certificate = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    certificate += ["-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", "key.pem"]
    certificate += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", "cert.pem"]
    subprocess.run(["openssl", *certificate], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[Server, str]]:
    options = {
        "--token-file": folder / "token",
        "--ssl-certfile": folder / "cert.pem",
        "--ssl-keyfile": folder / "key.pem",
        "--grpc-port": free_port(),
    }
    given = [str(word) for pair in options.items() for word in pair]
    with server(folder / "adapted.onnx", folder / "adapters", *given) as running:
        yield running, f"127.0.0.1:{options['--grpc-port']}"


def status(server: Server, folder: Path, path: str, **headers: str) -> int:
    """The status of an answer over TLS."""
    context = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    request = urllib.request.Request(f"https://{server.address}{path}", None, headers)
    try:
        with urllib.request.urlopen(request, timeout=LONG, context=context) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def guarded(server: Server, folder: Path) -> None:
    """All but the probes need the token."""
    ask = partial(status, server, folder)
    assert ask("/v2/health/ready") == ask("/v2/health/live") == 200
    assert ask("/v2/models/fr") == ask("/metrics") == ask("/nothing") == 401
    assert ask("/v2/models/fr", authorization=f"Basic {TOKEN}") == 401
    assert ask("/v2/models/fr", authorization=f"Bearer {TOKEN[:-1]}") == 401
    assert ask("/v2/models/fr", **BEARER) == 200


def test_all_but_the_probes_need_the_token_over_tls(
    served: tuple[Server, str], folder: Path
) -> None:
    guarded(served[0], folder)


def test_so_they_do_on_ray_and_each_request_leaves_a_line(folder: Path) -> None:
    log = folder / "access.log"
    options = {
        "--replicas": 1,
        "--token-file": folder / "token",
        "--ssl-certfile": folder / "cert.pem",
        "--ssl-keyfile": folder / "key.pem",
        "--access-log": log,
    }
    given = [str(word) for pair in options.items() for word in pair]
    with server_on_ray(folder / "adapted.onnx", folder / "adapters", *given) as running:
        guarded(running, folder)
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    found = [(line["path"], line["status"]) for line in lines]
    assert ("/v2/models/fr", 401) in found
    assert ("/v2/models/fr", 200) in found


def test_so_do_grpc_and_its_streams(served: tuple[Server, str], folder: Path) -> None:
    trusted = grpc.ssl_channel_credentials((folder / "cert.pem").read_bytes())
    tensor = triton.InferInput("x", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X)
    with triton.InferenceServerClient(served[1], ssl=True, creds=trusted) as client:
        assert client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="UNAUTHENTICATED"):
            client.infer("fr", [tensor])
        assert close(client.infer("fr", [tensor], headers=BEARER).as_numpy("y"), bumped(X, FR))
        for headers, expected in ((BEARER, "fr"), ({}, "UNAUTHENTICATED")):
            found: list[Any] = []
            client.start_stream(
                lambda result, error, to=found: to.append((result, error)), headers=headers
            )
            client.async_stream_infer("fr", [tensor])
            client.stop_stream()
            ((result, error),) = found
            assert expected in str(error or result.get_response().parameters["adapter"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--token-file", "none"], "none cannot be read"),
        (["--token-file", "short"], "short holds no token"),
        (["--ssl-certfile", "token"], "token: no certificate"),
        (["--ssl-certfile", "cert.pem", "--ssl-keyfile", "token"], "cert.pem and token: no"),
        (["--ssl-keyfile", "key.pem"], "a private key needs a certificate"),
        (["--ssl-keyfile", "key.pem", "--replicas", "2"], "a private key needs"),
        (["--access-log", "none/log", "--replicas", "2"], "none/log cannot be written"),
        (["--access-log", "none/log"], "none/log cannot be written"),
    ],
)
def test_files_that_guard_nothing_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], words: str
) -> None:
    monkeypatch.chdir(folder)
    Path("short").write_text("a b c d e f g h i j k l m", encoding="ascii")
    given = ["serve", "adapted.onnx", "--adapters", "adapters", *options]
    done = refused(*given)
    assert words in done.error
