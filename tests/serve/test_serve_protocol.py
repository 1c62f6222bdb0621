"""The Open Inference Protocol's bodies: what NVIDIA's client writes is read, and back."""

import contextlib
import json
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.http._utils import _get_inference_request

from onnx_adapt.errors import RequestError
from onnx_adapt.serve.choice import read_choice
from onnx_adapt.serve.protocol import HEADER_LENGTH, Spec, read_request, write_response
from onnx_adapt.serve.settings import read_settings
from onnx_adapt.serve.tensors import DATATYPES

ARRAYS = {
    **{
        name: np.array([[0, 1, 2], [3, 4, 5]], dtype)
        for name, dtype in DATATYPES.items()
        if name not in ("BOOL", "BYTES")
    },
    "BOOL": np.array([[True, False, True]]),
    "BYTES": np.array([["a", ""], ["é\n", "\x00"]], object),
}


def body(**changes: Any) -> bytes:
    tensor = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2], **changes}
    kept = {key: value for key, value in tensor.items() if value is not None}
    return json.dumps({"inputs": [kept]}).encode()


def written_by_triton(datatype: str) -> tuple[bytes, str | None]:
    array = ARRAYS[datatype]
    tensor = triton.InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    content, length = _get_inference_request(
        [tensor], "7", None, 0, False, False, 0, None, {"adapter": "fr"}
    )
    return content, None if length is None else str(length)


@pytest.mark.parametrize("datatype", ARRAYS)
def test_what_triton_sends_as_bytes_is_read_and_comes_back_as_bytes(datatype: str) -> None:
    content, length = written_by_triton(datatype)
    request = read_request(content, length)
    found = request.feeds["x"]
    assert found.dtype == DATATYPES[datatype]
    assert np.array_equal(found, ARRAYS[datatype])
    assert (request.adapter, request.datatypes, request.id) == ("fr", {"x": datatype}, "7")
    spec = Spec("x", datatype, found.shape)
    answer, headers = write_response(request, "m", "1", "", [(spec, found)])
    result = triton.InferResult.from_response_body(
        answer, header_length=int(headers[HEADER_LENGTH])
    )
    back = result.as_numpy("x")
    if datatype == "BYTES":
        back = np.vectorize(bytes.decode, otypes=[object])(back)
    assert np.array_equal(back, ARRAYS[datatype])
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize("datatype", ARRAYS)
def test_json_comes_back_as_json_flat_or_nested(datatype: str) -> None:
    array = ARRAYS[datatype]
    nested = (array.astype(float) if "F" in datatype else array).tolist()
    flat = [value for row in nested for value in row]
    spec = Spec("x", datatype, array.shape)
    for data in (nested, flat):
        request = read_request(body(datatype=datatype, shape=list(array.shape), data=data))
        assert request.feeds["x"].dtype == array.dtype
        assert np.array_equal(request.feeds["x"], array)
        answer, headers = write_response(request, "m", "1", "fr@0", [(spec, array)])
        assert json.loads(answer)["outputs"][0]["data"] == flat
        assert HEADER_LENGTH not in headers


def test_float32_survives_json_bit_for_bit() -> None:
    array = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    limits = np.finfo(np.float32)
    array[:5] = [limits.max, limits.tiny, limits.smallest_subnormal, -0.0, 2**24 - 1]
    array[5:50] = np.nextafter(array[50:95], np.inf)
    request = read_request(body(shape=[100], data=array.astype(float).tolist()))
    assert request.feeds["x"].tobytes() == array.tobytes()
    answer, _ = write_response(request, "m", "1", "", [(Spec("x", "FP32", (100,)), array)])
    found = np.array(json.loads(answer)["outputs"][0]["data"]).astype(np.float32)
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_float32_that_is_rounded_twice_is_written_with_more_digits(sign: int) -> None:
    array = np.array([0x15AE43FD, 0x15AE43FE], np.uint32).view(np.float32) * np.float32(sign)
    assert np.float32(float(str(array[0]))) == array[1]  # its shortest decimal gives the next
    for shaped in (array, np.asfortranarray(np.stack([array, array]))[:, ::-1]):
        spec = Spec("x", "FP32", shaped.shape)
        answer, _ = write_response(read_request(body()), "m", "1", "", [(spec, shaped)])
        found = np.array(json.loads(answer)["outputs"][0]["data"]).astype(np.float32)
        assert found.tobytes() == np.ascontiguousarray(shaped).tobytes()


def test_an_output_that_json_cannot_say_is_told_and_goes_as_bytes() -> None:
    array = np.array([np.nan, np.inf], np.float32)
    spec = Spec("y", "FP32", (2,))
    with pytest.raises(RequestError, match="NaN or infinity"):
        write_response(read_request(body()), "m", "1", "", [(spec, array)])
    document = json.loads(body()) | {"parameters": {"binary_data_output": True}}
    request = read_request(json.dumps(document).encode())
    answer, _ = write_response(request, "m", "1", "", [(spec, array)])
    assert answer.endswith(array.tobytes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datatype": "FP8"}, "no datatype 'FP8'"),
        ({"datatype": 1}, "`datatype` is 1"),
        ({"name": None}, "`name` is None"),
        ({"shape": [3]}, "shape \\[3\\] has not 2 values"),
        ({"shape": [-1]}, "`shape` is"),
        ({"shape": [True, 2]}, "`shape` is"),
        ({"shape": [2**40, 2**40]}, "too large"),
        ({"shape": [1] * 40}, "too large"),
        ({"shape": [0, 2**62], "data": []}, "too large"),
        ({"shape": "2"}, "`shape` is"),
        ({"data": 5}, "no list"),
        ({"data": [1, "2"]}, "no FP32"),
        ({"data": [[1], [2, 3]]}, "no FP32 tensor"),
        ({"data": [1, None]}, "no FP32"),
        ({"data": [1e39, 0]}, "too large for FP32"),
        ({"data": [[1, 2]]}, "nested"),
        ({"datatype": "INT8", "data": [1, 128]}, "128 is no INT8"),
        ({"datatype": "UINT8", "data": [1, -1]}, "-1 is no UINT8"),
        ({"datatype": "INT64", "data": [1, 2**64]}, "no INT64"),
        ({"datatype": "INT64", "data": [1, -(2**63) - 1]}, "no INT64"),
        ({"datatype": "UINT64", "data": [2**64]}, "no UINT64"),
        ({"shape": [2**64]}, "`shape` is"),
        ({"datatype": "INT64", "data": [1, 1.5]}, "no INT64"),
        ({"datatype": "BOOL", "data": [0, 1]}, "no BOOL"),
        ({"datatype": "BYTES", "data": ["a", 1]}, "no texts"),
        ({"datatype": "BYTES", "data": ["a", "\ud800"]}, "no text"),
        ({"data": None}, "give `data`"),
        ({"parameters": {"binary_data_size": 8}}, "give `data`"),
        ({"data": None, "parameters": {"binary_data_size": 8}}, "0 bytes follow"),
        ({"data": None, "parameters": {"binary_data_size": True}}, "0 bytes follow"),
        ({"parameters": {"shared_memory_region": "x"}}, "'shared_memory_region'"),
        ({"parameters": []}, "`parameters` is no JSON object"),
    ],
)
def test_a_tensor_that_is_not_right_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_request(body(**changes))


@pytest.mark.parametrize(
    ("content", "length", "message"),
    [
        (b"", None, "no JSON"),
        (b"[1]", None, "no JSON object"),
        (b"[" * 100_000, None, "no JSON"),
        (b'{"inputs": [{"name": "x", "data": [' + b"9" * 5000, None, "no JSON"),
        (b'{"inputs": [NaN]}', None, "no NaN"),
        (b"\xff", None, "no JSON"),
        (b"{}", None, "no `inputs`"),
        (b'{"inputs": 1}', None, "no list"),
        (b'{"inputs": [1]}', None, "no list"),
        (b"{}", "3", "has 2 bytes"),
        (b"{}", "-1", "has 2 bytes"),
        (b"{}", "9" * 9000, "has 2 bytes"),
        (body() + b"rest", str(len(body())), "4 bytes follow"),
        (b'{"parameters": {"adaptor": "fr"}, "inputs": []}', None, "'adaptor'"),
        (b'{"parameters": {"binary_data_output": 1}}', None, "true or false"),
        (body()[:-1] + b', "id": 1}', None, "`id` is 1"),
        (body()[:-1] + rb', "id": "\ud800"}', None, "no text"),
        (body()[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None, "no JSON"),
    ],
)
def test_a_body_that_is_not_right_is_refused(
    content: bytes, length: str | None, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        read_request(content, length)


@pytest.mark.parametrize(
    ("datatype", "raw", "message"),
    [
        ("FP32", b"1234567", "has 8 bytes; there are 7"),
        ("BOOL", b"\x02\x00", "0 or 1"),
        ("BYTES", b"\x01\x00\x00", "ends within"),
        ("BYTES", b"\xff\xff\xff\x7fa", "ends within"),
        ("BYTES", b"\x01\x00\x00\x00\xff", "UTF-8"),
        ("BYTES", b"\x01\x00\x00\x00a", "has not 1 values"),
    ],
)
def test_raw_bytes_that_are_not_right_are_refused(
    datatype: str, raw: bytes, message: str
) -> None:
    size = {"binary_data_size": len(raw)}
    head = body(datatype=datatype, data=None, parameters=size)
    with pytest.raises(RequestError, match=message):
        read_request(head + raw, str(len(head)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda item: (
        st.lists(item, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "x"]), item
        )
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    JSON,
    st.sampled_from(["", "inputs", "outputs", "parameters", "id"]),
    st.binary(max_size=16),
)
@settings(max_examples=300, deadline=None)
def test_whatever_comes_is_read_or_refused(
    key: str, value: Any, top: str, rest: bytes
) -> None:
    document = json.loads(body())
    document["inputs"][0][key] = value
    if top:
        document[top] = value
    head = json.dumps(document).encode()
    for content, length in ((head, None), (head + rest, str(len(head))), (rest, None)):
        with contextlib.suppress(RequestError):
            request = read_request(content, length)
            assert read_choice("base", "base", request.adapter, "") is not None


@given(st.sampled_from(sorted(DATATYPES)), st.binary(max_size=40), st.integers(0, 10))
@settings(max_examples=300, deadline=None)
def test_whatever_bytes_come_are_read_or_refused(datatype: str, raw: bytes, size: int) -> None:
    head = body(
        datatype=datatype, shape=[size], data=None, parameters={"binary_data_size": len(raw)}
    )
    try:
        found = read_request(head + raw, str(len(head))).feeds["x"]
    except RequestError:
        return
    assert found.shape == (size,)
    assert datatype == "BYTES" or found.tobytes() == raw


BLEND = {"fr": 0.7, "de": 0.3}


@pytest.mark.parametrize(
    ("model", "parameter", "header", "expected"),
    [
        ("base", None, "", {}),
        ("fr", None, "", {"fr": 1}),
        ("base", "fr", "", {"fr": 1}),
        ("base", None, "fr", {"fr": 1}),
        ("fr", "fr", "fr", {"fr": 1}),
        ("base", BLEND, "", BLEND),
        ("base", json.dumps(BLEND), "", BLEND),
        ("base", None, json.dumps(BLEND), BLEND),
    ],
)
def test_an_adapter_is_named_in_the_url_as_a_parameter_or_by_the_header(
    model: str, parameter: Any, header: str, expected: dict
) -> None:
    assert read_choice(model, "base", parameter, header) == expected


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("../fr", "no name"),
        ("/etc/passwd", "no name"),
        ("fr@3f2a9c01b2d4", "no name"),
        ("fr@", "no name"),
        ("fr@a@b", "no name"),
        ("", "no name"),
        ("f" * 101, "no name"),
        (".hidden", "no name"),
        (5, "parameter `adapter` is 5"),
        ({}, "parameter `adapter` is {}"),
        ("{}", "parameter `adapter` is {}"),
        ('{"fr": ', "no JSON"),
        ({"../fr": 1}, "no name"),
        ({"fr": "1"}, "no usable number"),
        ({"fr": True}, "no usable number"),
        ({"fr": 10**400}, "no usable number"),
        ('{"fr": 1e999}', "no usable number"),
        ("de", "several adapters"),
        ({"fr": 0.5}, "several adapters"),
    ],
)
def test_what_names_no_adapter_or_another_one_is_refused(parameter: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_choice("fr", "base", parameter, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": 2}, "no setting 'replica'"),
        ({"adapters": ""}, "`adapters` is missing"),
        ({"replicas": "two"}, "`replicas` is 'two'"),
        ({"replicas": 0}, "`replicas` is 0"),
        ({"batching": "maybe"}, "`batching` is 'maybe'"),
        ({"timeout_s": "nan"}, "`timeout_s` is 'nan'"),
        ({"name": "a/b"}, "no name for a model"),
    ],
)
def test_a_wrong_setting_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_settings({"model": "m.onnx", "adapters": "a", **arguments})


def test_settings_are_read_from_the_text_that_serve_run_gives() -> None:
    given = {"batching": "False", "batch_axis": "0", "timeout_s": "2.5", "batch_wait_ms": 0}
    found = read_settings({"model": "m.onnx", "adapters": "a", **given})
    assert (found.batching, found.batch_axis, found.timeout_s) == (False, 0, 2.5)
    assert found.base == "m"


def test_integers_of_64_bits_are_exact_beside_small_ones() -> None:
    values = [2**63, 1, 2**64 - 1, 2**53 + 1]
    tensor = {"name": "x", "datatype": "UINT64", "shape": [4], "data": values}
    found = read_request(json.dumps({"inputs": [tensor]}).encode()).feeds["x"]
    assert found.tolist() == values
    for wrong in (1.5, True, -1):
        body = json.dumps({"inputs": [{**tensor, "data": [2**63, wrong, 1, 1]}]}).encode()
        with pytest.raises(RequestError, match="no UINT64"):
            read_request(body)
