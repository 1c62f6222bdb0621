"""`/v1/embeddings`: each text's vector is that of a session, whatever it is batched with."""

import base64
import concurrent.futures
import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from serve_clients import PROGRAM, Server, server
from waiting import LONG

import onnx_adapt as oa

CASES = Path("tests/cases")
WORDS = [f"w{i}" for i in range(60)]
TEXTS = ["w1 w2 w3", "w7", " ".join(WORDS[:14]), "w9 w9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    base = oa.open_model(CASES / "bases/bert_headless/base.onnx")
    trained = oa.load_checkpoint(CASES / "st_bert_lora/adapter", base, name="fr")
    oa.save_model(oa.insert_checkpoint(base, trained), folder / "adapted.onnx")
    (folder / "adapters").mkdir()
    oa.save_adapter(trained.adapter, folder / "adapters/fr.safetensors")
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=30)  # as many files have it; it must not count
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Server]:
    options = ["--embed", "--tokenizer", str(folder / "tokenizer.json"), "--normalize"]
    with server(folder / "adapted.onnx", folder / "adapters", *options) as running:
        yield running


def asked(served: Server, **document: Any) -> tuple[int, Any]:
    body = json.dumps(document).encode()
    request = urllib.request.Request(f"http://{served.address}/v1/embeddings", body)
    try:
        with urllib.request.urlopen(request, timeout=LONG) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, list[np.ndarray]]:
    """Each text alone, not padded, through a session; the mean of its tokens."""
    files = {"fr": folder / "adapters/fr.safetensors"}
    found: dict[str, list[np.ndarray]] = {"fr": [], "adapted": []}
    with oa.AdapterSession(folder / "adapted.onnx", files) as session:
        for name in found:
            for text in TEXTS:
                ids = np.array([[int(word[1:]) for word in text.split()]])
                feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                feeds["token_type_ids"] = np.zeros_like(ids)
                states = session.run(feeds, None if name == "adapted" else name)
                vector = states["last_hidden_state"][0].mean(0)
                found[name].append(vector / np.linalg.norm(vector))
    return found


def test_an_alias_is_a_model_too(served: Server, truth: dict[str, list[np.ndarray]]) -> None:
    path = f"http://{served.address}/v2/repository/models/fr@live"
    body = json.dumps({"parameters": {"adapter": "fr"}}).encode()
    urllib.request.urlopen(f"{path}/load", body, timeout=LONG).close()
    status, found = asked(served, model="fr@live", input=TEXTS[0])
    urllib.request.urlopen(f"{path}/unload", b"", timeout=LONG).close()
    assert (status, found["model"]) == (200, "fr@live")
    assert np.abs(np.array(found["data"][0]["embedding"]) - truth["fr"][0]).max() < 1e-5


@pytest.mark.parametrize("name", ["fr", "adapted"])
def test_a_text_has_the_vector_of_a_session_with_its_adapter(
    served: Server, truth: dict[str, list[np.ndarray]], name: str
) -> None:
    status, found = asked(served, model=name, input=TEXTS)
    assert (status, found["object"], found["model"]) == (200, "list", name)
    for item, expected in zip(found["data"], truth[name], strict=True):
        assert np.abs(np.array(item["embedding"]) - expected).max() < 1e-5
    assert [item["index"] for item in found["data"]] == [0, 1, 2, 3]
    assert found["usage"] == {"prompt_tokens": 20, "total_tokens": 20}
    _, other = asked(served, model=name, input=[7], encoding_format="base64")
    vector = np.frombuffer(base64.b64decode(other["data"][0]["embedding"]), "<f4")
    assert np.abs(vector - truth[name][1]).max() < 1e-5


def test_clients_with_different_adapters_get_their_own_vectors(
    served: Server, truth: dict[str, list[np.ndarray]]
) -> None:
    jobs = [(["fr", "adapted"][i % 2], i % 4) for i in range(48)]

    def one(job: tuple[str, int]) -> np.ndarray:
        _, found = asked(served, model=job[0], input=TEXTS[job[1]])
        return np.array(found["data"][0]["embedding"])

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for (name, i), vector in zip(jobs, pool.map(one, jobs), strict=True):
            assert np.abs(vector - truth[name][i]).max() < 1e-5


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        ({"input": "w1"}, 400, "`model` is missing"),
        ({"model": "xx", "input": "w1"}, 404, "not in the repository"),
        ({"model": "fr"}, 400, "`input` is no text"),
        ({"model": "fr", "input": []}, 400, "`input` is no text"),
        ({"model": "fr", "input": [""]}, 400, "without tokens"),
        ({"model": "fr", "input": ["w1", "\ud83d"]}, 400, "a text that is no text"),
        ({"model": "fr", "input": ["w1"] * 2049}, 400, "has 2049 texts"),
        ({"model": "fr", "input": ["w1", 2]}, 400, "neither a text"),
        ({"model": "fr", "input": [[999]]}, 400, ""),
        ({"model": "fr", "input": "w1", "dimensions": 8}, 400, "'dimensions'"),
        ({"model": "fr", "input": "w1", "encoding_format": "x"}, 400, "float or base64"),
    ],
)
def test_what_cannot_be_embedded_is_an_error_that_openai_s_clients_read(
    served: Server, document: dict, status: int, words: str
) -> None:
    code, found = asked(served, **document)
    assert code == status, found
    assert words in found["error"]["message"]
    assert found["error"]["type"] == "invalid_request_error"


def test_models_are_listed(served: Server) -> None:
    with urllib.request.urlopen(f"http://{served.address}/v1/models", timeout=LONG) as answer:
        names = [item["id"] for item in json.loads(answer.read())["data"]]
    assert names == ["adapted", "fr"]


def test_what_cannot_embed_is_told_at_once(folder: Path) -> None:
    given = [PROGRAM, "serve", folder / "adapted.onnx", "--adapters", folder / "adapters"]
    for options, words in (
        (["--embed"], "needs --tokenizer"),
        (["--normalize"], "need --embed"),
        (["--embed", "--tokenizer", folder / "adapted.onnx"], "is no tokenizer"),
        (["--embed", "--tokenizer", "t.json", "--replicas", "1"], "not for Ray"),
    ):
        command = [*given, "--port", "0", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)
        assert words in done.stderr
