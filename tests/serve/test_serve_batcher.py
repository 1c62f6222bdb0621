"""Requests are joined where their shapes allow, and every one gets its own rows back."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import bumped
from onnx import helper
from session_adapters import BASE, DE, FR, X, adapted_file, close

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, RequestError, RunError
from onnx_adapt.serve.batcher import Batcher, Job
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.serve.tensors import DATATYPES


class Counting(oa.AdapterSession):
    """A session that knows how many runs it was asked for."""

    asked = 0

    def run(self, *arguments: Any) -> dict[str, Any]:
        self.asked += 1
        return super().run(*arguments)


@pytest.fixture
def batcher(tmp_path: Path) -> Batcher:
    return make(tmp_path, batch_axis=0)


def make(tmp_path: Path, **options: Any) -> Batcher:
    path = adapted_file(tmp_path)
    batcher = Batcher(str(path), threads=1, **options)
    batcher.session = Counting(path, {"fr": FR, "de": DE}, batch_axis=0)
    return batcher


TRUTH = {None: BASE, "fr": bumped(X, FR), "de": bumped(X, DE)}


def test_requests_of_all_adapters_are_one_batch_and_each_gets_its_own_rows(
    batcher: Batcher,
) -> None:
    parts = [("fr", 0, 2), (None, 2, 3), ("de", 1, 6), ("fr", 5, 6), (None, 0, 6)]
    jobs = [Job({"x": X[a:b]}, ("y",), name) for name, a, b in parts]
    results = batcher.run(jobs)
    for (name, a, b), result in zip(parts, results, strict=True):
        assert close(result["y"], TRUTH[name][a:b])
    assert batcher.session.asked == 1


def test_a_blend_is_joined_with_others(batcher: Batcher) -> None:
    blend = {"fr": 0.7, "de": 0.3}
    results = batcher.run([Job({"x": X}, ("y",), a) for a in (blend, "fr", blend)])
    for result, adapter in zip(results, (blend, "fr", blend), strict=True):
        assert close(result["y"], batcher.session.run({"x": X}, adapter)["y"])
    assert batcher.session.asked == 4


def test_a_bad_request_does_not_spoil_those_beside_it(batcher: Batcher) -> None:
    jobs = [Job({"x": X}, ("y",), name) for name in ("fr", "nobody", "de")]
    good, bad, other = batcher.run(jobs)
    assert isinstance(bad, AdaptError)
    assert close(good["y"], TRUTH["fr"])
    assert close(other["y"], TRUTH["de"])


def test_an_axis_that_is_not_called_batch_is_not_taken_for_one(tmp_path: Path) -> None:
    batcher = make(tmp_path)
    batcher.run([Job({"x": X}, ("y",), "fr"), Job({"x": X}, ("y",), "fr")])
    assert batcher.session.asked == 2


def saved(path: Path, text: str) -> Path:
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    return path


GRAPH = '<ir_version: 8, opset_import: ["": 17]> g '


def test_shapes_that_differ_are_not_joined_and_those_that_agree_are(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        GRAPH + "(float[batch,n] x) => (float[batch,n] y) { y = Neg(x) }",
    )
    batcher = Batcher(str(path))
    batcher.session = Counting(path)
    shapes = [(1, 3), (2, 4), (2, 3), (1, 4), (0, 3)]
    arrays = [np.random.default_rng(0).random(shape, np.float32) for shape in shapes]
    results = batcher.run([Job({"x": array}, ("y",)) for array in arrays])
    for result, array in zip(results, arrays, strict=True):
        assert np.array_equal(result["y"], -array)
    assert batcher.session.asked == 3


def test_an_output_without_a_batch_axis_is_computed_for_each_request(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        GRAPH + "(float[batch,2] x) => (float[batch,2] y, float s)"
        " { y = Neg(x)  s = ReduceSum<keepdims=0>(x) }",
    )
    batcher = Batcher(str(path))
    batcher.session = Counting(path)
    ones, twos = np.ones((1, 2), np.float32), np.full((1, 2), 2, np.float32)
    results = batcher.run([Job({"x": x}, ("y", "s")) for x in (ones, twos)])
    assert [float(result["s"]) for result in results] == [2, 4]
    batcher.run([Job({"x": x}, ("y",)) for x in (ones, twos)])
    assert batcher.session.asked == 3


def test_a_model_that_mixes_its_rows_up_is_found_out_by_its_output(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        GRAPH + "(float[batch,2] x) => (float[batch,2] y) { y = ReduceSum<keepdims=1>(x) }",
    )
    batcher = Batcher(str(path))
    ones = np.ones((1, 2), np.float32)
    results = batcher.run([Job({"x": ones}, ("y",)), Job({"x": 2 * ones}, ("y",))])
    assert [result["y"].tolist() for result in results] == [[[2]], [[4]]]


def test_a_model_of_a_fixed_batch_takes_one_request_at_a_time(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx", GRAPH + "(float[1,2] x) => (float[1,2] y) { y = Neg(x) }"
    )
    batcher = Batcher(str(path))
    batcher.session = Counting(path)
    ones = np.ones((1, 2), np.float32)
    results = batcher.run([Job({"x": ones}, ("y",))] * 3)
    assert [result["y"].tolist() for result in results] == [[[-1, -1]]] * 3
    assert batcher.session.asked == 3


def identity(path: Path, elem_type: int) -> Path:
    x, y = (helper.make_tensor_value_info(n, elem_type, ["batch", 2]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    opset = helper.make_opsetid("", 19)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_goes_through_the_model(tmp_path: Path, datatype: str) -> None:
    dtype = DATATYPES[datatype]
    elem_type = 8 if datatype == "BYTES" else helper.np_dtype_to_tensor_dtype(dtype)
    batcher = Batcher(str(identity(tmp_path / "m.onnx", elem_type)))
    assert batcher.inputs == {"x": Spec("x", datatype, (-1, 2))}
    texts = np.array([["a", "é"], ["", "b"]], object)
    array = texts if datatype == "BYTES" else np.array([[0, 1], [1, 0]], dtype)
    batcher.check({"x": array}, {"x": datatype}, ["y"])
    for result in batcher.run([Job({"x": array}, ("y",)), Job({"x": array[:1]}, ("y",))]):
        assert result["y"].dtype == dtype
        assert np.array_equal(result["y"], array[: len(result["y"])])


def test_a_type_without_a_word_in_the_protocol_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"'x' is tensor\(float8e4m3fn\)"):
        Batcher(str(identity(tmp_path / "m.onnx", onnx.TensorProto.FLOAT8E4M3FN)))


@pytest.mark.parametrize(
    ("feeds", "datatype", "outputs", "message"),
    [
        ({}, "FP32", [], "'x' is missing"),
        ({"x": X, "z": X}, "FP32", [], "'z' is no input"),
        ({"x": X, "adapter.fc1.down": X}, "FP32", [], "'adapter.fc1.down' is no input"),
        ({"x": X}, "FP64", [], "'x' is FP32, not FP64"),
        ({"x": X[:, :3]}, "FP32", [], r"has shape \[-1, 4\], not \[6, 3\]"),
        ({"x": X[0]}, "FP32", [], r"has shape \[-1, 4\], not \[4\]"),
        ({"x": X}, "FP32", ["z"], "'z' is no output"),
        ({"x": np.tile(X, (2, 1))}, "FP32", [], "12 rows; the most is 10"),
    ],
)
def test_what_the_model_cannot_take_is_refused_before_it_runs(
    tmp_path: Path, feeds: dict, datatype: str, outputs: list, message: str
) -> None:
    batcher = make(tmp_path, batch_axis=0, max_rows=10)
    with pytest.raises(RequestError, match=message):
        batcher.check(feeds, dict.fromkeys(feeds, datatype), outputs)


def test_a_server_takes_a_provider_and_refuses_one_that_is_not_here(tmp_path: Path) -> None:
    path = str(adapted_file(tmp_path))
    assert Batcher(path, provider="cpu").inputs
    with pytest.raises(RunError, match="no execution provider 'cudda'"):
        Batcher(path, provider="cudda")


def test_two_sizes_of_one_symbol_are_refused(tmp_path: Path) -> None:
    case = "tests/cases/peft_bert_lora_default_ts/base.onnx"
    batcher = Batcher(case, threads=1)
    feeds = {name: np.ones((2, 3), np.int64) for name in batcher.inputs}
    types = dict.fromkeys(feeds, "INT64")
    batcher.check(feeds, types, ())
    feeds["attention_mask"] = feeds["attention_mask"][:1]
    with pytest.raises(RequestError, match="is 2 in 'input_ids' and 1 in 'attention_mask'"):
        batcher.check(feeds, types, ())
