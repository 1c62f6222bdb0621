"""Calls of layers: the same float tensors however the weight is stored."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from sites_models import HEADER, model
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.checkpoints.modules.weights import read_matrix
from onnx_adapt.graph.column_spans import column_spans
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import is_module_call
from onnx_adapt.graph.sites import survey_model

RNG = np.random.default_rng(15)


def _calls(made: oa.Model) -> list[LayerCall]:
    survey = survey_model(made)
    view = survey.index.main
    found = [survey.call(view, node) for node in view.nodes if is_module_call(view, node)]
    return [call for call in found if call is not None]


def _made(text: str, opset: int = 17, **arrays: Any) -> oa.Model:
    """A model from the text of a graph, with initializers of these values."""
    proto = onnx.parser.parse_model(HEADER.format(ir=10, opset=opset) + text)
    tensors = (numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    proto.graph.initializer.extend(tensors)
    return oa.Model(proto)


def _saved(made: oa.Model, path: Path) -> str:
    onnx.save(made.proto, path)
    return str(path)


LINEAR = "g (float[B,S,64] x) => (float[B,S,48] y) {h = MatMul(x, w) y = Add(h, b)}"


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_a_linear_of_integers_is_called_with_the_floats_around_it(
    per_channel: bool, signed: bool, tmp_path: Path
) -> None:
    kind = QuantType.QInt8 if signed else QuantType.QUInt8
    source = _saved(model(LINEAR, "w 64 48", "b 48"), tmp_path / "float.onnx")
    quantised = str(tmp_path / "q8.onnx")
    quantize_dynamic(source, quantised, per_channel=per_channel, weight_type=kind)
    made = oa.open_model(quantised)
    (call,) = _calls(made)
    assert call.node.op_type == "MatMulInteger"
    assert (call.source, call.raw, call.output, call.sizes) == ("x", "h", "y", (64, 48))
    (stored,) = (t for t in onnx.load(source).graph.initializer if t.name == "w")
    weight = numpy_helper.to_array(stored)
    step = np.ptp(weight) / 127  # two steps of 8 bits over the whole range
    np.testing.assert_allclose(read_matrix(made, call), weight.T, rtol=0, atol=step)
    (site,) = oa.find_sites(made)
    assert (site.tensor, site.width, site.refused) == ("y", 48, None)


def test_a_convolution_of_integers_is_called_with_the_floats_around_it(tmp_path: Path) -> None:
    text = "g (float[B,4,8,8] x) => (float[B,6,6,6] y) {y = Conv(x, w, b)}"
    source = _saved(model(text, "w 6 4 3 3", "b 6"), tmp_path / "float.onnx")
    quantize_dynamic(source, tmp_path / "q8.onnx", weight_type=QuantType.QUInt8)
    made = oa.open_model(tmp_path / "q8.onnx")
    (call,) = _calls(made)
    assert call.node.op_type == "ConvInteger"
    assert (call.source, call.output, call.sizes) == ("x", "y", (4, 6))
    (stored,) = (t for t in onnx.load(source).graph.initializer if t.name == "w")
    weight = numpy_helper.to_array(stored)
    np.testing.assert_allclose(read_matrix(made, call), weight, atol=np.ptp(weight) / 127)


INTEGERS = {
    "w": RNG.integers(0, 255, (64, 48)).astype(np.uint8),
    "ws": np.float32(0.1),
    "gamma": np.ones(48, np.float32),
}


def test_a_product_that_something_else_multiplies_ends_before_that() -> None:
    made = _made(
        "g (float[B,64] x) => (float[B,48] y) {q, s, z = DynamicQuantizeLinear(x) "
        "i = MatMulInteger(q, w, z) c = Cast<to=1>(i) t = Mul(s, ws) h = Mul(c, t) "
        "y = Mul(h, gamma)}",
        **INTEGERS,
    )
    (call,) = _calls(made)
    assert (call.source, call.raw, call.output) == ("x", "h", "h")


def test_scales_one_after_the_other_are_both_a_part_of_the_product() -> None:
    made = _made(
        "g (float[B,64] x) => (float[B,48] y) {q, s, z = DynamicQuantizeLinear(x) "
        "i = MatMulInteger(q, w, z) c = Cast<to=1>(i) t = Mul(c, s) h = Mul(ws, t) "
        "y = Mul(h, gamma)}",
        **INTEGERS,
    )
    (call,) = _calls(made)
    assert (call.source, call.raw) == ("x", "h")
    np.testing.assert_allclose(read_matrix(made, call), INTEGERS["w"].T * 0.1, rtol=1e-6)


def test_a_product_of_integers_that_is_read_as_integers_is_no_call() -> None:
    made = _made(
        "g (float[B,64] x) => (float[B,48] y, int32[B,48] i) {"
        "q, s, z = DynamicQuantizeLinear(x) i = MatMulInteger(q, w, z) c = Cast<to=1>(i) "
        "t = Mul(s, ws) y = Mul(c, t)}",
        **INTEGERS,
    )
    assert _calls(made) == []


def test_a_table_of_integers_is_called_with_the_rows_as_floats() -> None:
    made = _made(
        "g (int64[B,S] ids) => (float[B,S,48] y) {r = Gather(w, ids) "
        "y = DequantizeLinear(r, ws)}",
        **INTEGERS,
    )
    (call,) = _calls(made)
    assert (call.source, call.output, call.sizes) == ("ids", "y", (64, 48))
    (site,) = oa.find_sites(made)
    assert (site.tensor, site.width, site.refused) == ("y", 48, None)


def _in_blocks(path: Path, **options: Any) -> oa.Model:
    source = model(LINEAR, "w 64 48", "b 48")
    quantiser = MatMulNBitsQuantizer(source.proto, **options)
    quantiser.process()
    onnx.save(quantiser.model.model, path)
    return oa.open_model(path)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (8, 32), (4, 128)])
def test_a_weight_in_blocks_is_read_as_onnx_runtime_multiplies_it(
    bits: int, block: int, symmetric: bool, tmp_path: Path
) -> None:
    made = _in_blocks(tmp_path / "q.onnx", bits=bits, block_size=block, is_symmetric=symmetric)
    (call,) = _calls(made)
    assert (call.node.op_type, call.sizes) == ("MatMulNBits", (64, 48))
    _is_what_runs(made, call)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("block", [16, 64])
def test_a_weight_in_four_bits_of_a_table_is_read_as_onnx_runtime_multiplies_it(
    kind: int, block: int, tmp_path: Path
) -> None:
    quantiser = MatMulBnb4Quantizer(model(LINEAR, "w 64 48", "b 48").proto, kind, block)
    quantiser.process()
    onnx.save(quantiser.model.model, tmp_path / "q.onnx")
    made = oa.open_model(tmp_path / "q.onnx")
    (call,) = _calls(made)
    assert (call.node.op_type, call.source, call.output) == ("MatMulBnb4", "x", "y")
    _is_what_runs(made, call)


def _is_what_runs(made: oa.Model, call: LayerCall) -> None:
    """Compare a weight with what ONNX Runtime makes of the rows of the identity."""
    bias = next(t for t in made.proto.graph.initializer if t.name == "b")
    (rows,) = run(made, {"x": np.eye(64, dtype=np.float32)[None]})
    expected = (rows[0] - numpy_helper.to_array(bias)).T
    np.testing.assert_allclose(read_matrix(made, call), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_dequantised_in_blocks_is_read_as_onnx_runtime_multiplies_it(
    axis: int,
) -> None:
    text = (
        "g (float[B,S,64] x) => (float[B,S,48] y) {w = DequantizeLinear<axis="
        f"{axis}, block_size=16>(q, s, z) h = MatMul(x, w) y = Add(h, b)}}"
    )
    shape = (4, 48) if axis == 0 else (64, 3)
    made = _made(
        text,
        opset=21,
        q=RNG.integers(0, 255, (64, 48)).astype(np.uint8),
        s=RNG.random(shape).astype(np.float32),
        z=RNG.integers(0, 255, shape).astype(np.uint8),
        b=np.ones(48, np.float32),
    )
    (call,) = _calls(made)
    _is_what_runs(made, call)


@pytest.mark.parametrize(
    ("equation", "shape"), [("bsd,dh->bsh", "64 48"), ("bsd,hd->bsh", "48 64")]
)
def test_an_einsum_with_a_matrix_is_a_linear(equation: str, shape: str) -> None:
    text = (
        f'g (float[B,S,64] x) => (float[B,S,48] y) {{h = Einsum<equation="{equation}">(x, w) '
        "y = Add(h, b)}"
    )
    made = model(text, f"w {shape}", "b 48")
    (call,) = _calls(made)
    assert (call.source, call.raw, call.output, call.sizes) == ("x", "h", "y", (64, 48))
    _is_what_runs(made, call)


def test_an_einsum_over_heads_is_no_linear() -> None:
    text = (
        'g (float[B,S,8] x) => (float[B,S,2,3] y) {y = Einsum<equation="btd,dnh->btnh">(x, w)}'
    )
    assert _calls(model(text, "w 8 2 3")) == []


@pytest.mark.parametrize(
    ("readers", "spans"),
    [
        ("a, p, c = Split<axis=-1>(y, sizes)", [(0, 24), (24, 36), (36, 48)]),
        ("a, p = Split<axis=2, num_outputs=2>(y)", [(0, 24), (24, 48)]),
        ("a, p = Split<axis=1, num_outputs=2>(y)", []),
        (
            "a = Slice(y, zero, middle, last) p = Slice(y, middle, end, last)",
            [(0, 24), (24, 48)],
        ),
        ("a = Slice(y, zero, middle, last) p = Slice(y, zero, end, last)", []),
        ("a = Slice(y, zero, middle, last, last) p = Slice(y, middle, end, last)", []),
        ("a = Relu(y)", []),
    ],
)
def test_the_columns_of_a_layer_are_cut_where_its_readers_cut_them(
    readers: str, spans: list[tuple[int, int]]
) -> None:
    numbers = {"sizes": [24, 12, 12], "zero": [0], "middle": [24], "end": [1 << 40]}
    arrays = {name: np.array(value) for name, value in {**numbers, "last": [-1]}.items()}
    floats = {"w": np.zeros((64, 48), np.float32), "b": np.zeros(48, np.float32)}
    made = _made(LINEAR.replace("}", f" {readers}}}"), opset=18, **arrays, **floats)
    del made.proto.graph.output[:]
    for name in {"a", "p", "c"} & {n for node in made.proto.graph.node for n in node.output}:
        declared = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        made.proto.graph.output.append(declared)
    (call,) = _calls(made)
    assert column_spans(call) == spans
