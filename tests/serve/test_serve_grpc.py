"""The protocol over gRPC: what NVIDIA's client sends is answered as over HTTP."""

import json
import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from adapter_models import bumped
from serve_clients import free_port, server
from session_adapters import BASE, DE, FR, X, adapted_file, close
from tritonclient.grpc import service_pb2

import onnx_adapt as oa
from onnx_adapt.errors import RequestError
from onnx_adapt.serve.grpc_messages import _FIELDS, message
from onnx_adapt.serve.grpc_requests import read_grpc_request

TRUTH = {"adapted": BASE, "fr": bumped(X, FR), "de": bumped(X, DE)}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "adapters").mkdir()
    for name, item in (("fr", FR), ("de", DE)):
        oa.save_adapter(item, folder / f"adapters/{name}.npz")
    port = str(free_port())
    served = server(adapted_file(folder), folder / "adapters", "--grpc-port", port)
    with served, triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def tensor(x: np.ndarray = X) -> Any:
    found = triton.InferInput("x", list(x.shape), "FP32")
    found.set_data_from_numpy(x)
    return found


@pytest.mark.parametrize("name", _FIELDS)
def test_messages_are_those_of_triton(name: str) -> None:
    theirs = service_pb2.DESCRIPTOR.message_types_by_name[name.partition(".")[0]]
    for part in name.split(".")[1:]:
        theirs = theirs.nested_types_by_name[part]
    for field in message(name).DESCRIPTOR.fields:
        other = theirs.fields_by_number[field.number]
        assert (field.name, field.type, field.is_repeated) == (
            other.name,
            other.type,
            other.is_repeated,
        )
        mine, his = field.message_type, other.message_type
        assert (mine and mine.full_name) == (his and his.full_name)
        assert bool(field.containing_oneof) == bool(other.containing_oneof)


def test_the_server_tells_what_it_is_and_has(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "onnx-adapt"
    found = client.get_model_metadata("fr")
    assert [(item.name, list(item.shape)) for item in found.inputs] == [("x", [-1, 4])]
    assert client.is_model_ready("fr", found.versions[0])
    assert not client.is_model_ready("xx")
    index = client.get_model_repository_index()
    assert [item.name for item in index.models] == ["adapted", "de", "fr"]


@pytest.mark.parametrize("name", TRUTH)
def test_triton_s_client_gets_what_a_session_computes(client: Any, name: str) -> None:
    result = client.infer(name, [tensor()], request_id="7")
    assert close(result.as_numpy("y"), TRUTH[name])
    assert result.get_response().id == "7"
    by_parameter = client.infer("adapted", [tensor()], parameters={"adapter": name})
    assert close(by_parameter.as_numpy("y"), TRUTH[name])


def test_a_blend_is_a_parameter_of_text(client: Any) -> None:
    blend = json.dumps({"fr": 0.5, "de": 0.5})
    result = client.infer("adapted", [tensor()], parameters={"adapter": blend})
    assert result.as_numpy("y").shape == BASE.shape


def test_a_stream_answers_each_request_and_one_that_fails_does_not_end_it(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for name in ("fr", "xx", "de"):
        client.async_stream_infer(name, [tensor()])
    client.stop_stream()
    (fr, _), (_, error), (de, _) = (answers.get(timeout=60) for _ in range(3))
    assert close(fr.as_numpy("y"), TRUTH["fr"])
    assert "'xx' is not in the repository" in str(error)
    assert close(de.as_numpy("y"), TRUTH["de"])


def test_an_adapter_can_be_unloaded_and_loaded(client: Any) -> None:
    client.unload_model("de")
    assert not client.is_model_ready("de")
    client.load_model("de")
    assert client.is_model_ready("de")


def test_an_alias_is_set_and_asked_for(client: Any) -> None:
    request = service_pb2.RepositoryModelLoadRequest(model_name="fr@stable")
    request.parameters["adapter"].string_param = "de"
    client._client_stub.RepositoryModelLoad(request)
    assert close(client.infer("fr@stable", [tensor()]).as_numpy("y"), TRUTH["de"])
    client.unload_model("fr@stable")


@pytest.mark.parametrize(
    ("model", "x", "code", "words"),
    [
        ("xx", X, "NOT_FOUND", "not in the repository"),
        ("fr", X[:, :3], "INVALID_ARGUMENT", "not [6, 3]"),
    ],
    ids=["unknown", "shape"],
)
def test_what_cannot_be_answered_has_a_code_and_words(
    client: Any, model: str, x: np.ndarray, code: str, words: str
) -> None:
    with pytest.raises(triton.InferenceServerException, match=code) as refused:
        client.infer(model, [tensor(x)])
    assert words in refused.value.message()


def test_values_may_come_as_contents() -> None:
    request = message("ModelInferRequest")()
    item = request.inputs.add(name="x", datatype="FP32", shape=[2])
    item.contents.fp32_contents.extend([1, 2])
    assert read_grpc_request(request).feeds["x"].tolist() == [1, 2]
    request.raw_input_contents.append(b"\0" * 8)
    with pytest.raises(RequestError, match="not both"):
        read_grpc_request(request)
