"""Verification of models that are wrong: each defect fails, and the report says where."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from slot_models import BRANCHES, MLP, SILENCED, dense, model_of, node_of, weight

import onnx_adapt as oa
from onnx_adapt.edit.weights import fill_weights
from onnx_adapt.errors import MismatchError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _failed(report: oa.Report) -> set[str]:
    assert not report.passed
    failed = {check.name for check in report.checks if not check.passed}
    with pytest.raises(MismatchError) as caught:
        report.raise_for_mismatch()
    assert all(name in caught.value.message for name in failed)
    assert "--json" in caught.value.hint
    return failed


def _detail(report: oa.Report, name: str) -> str:
    return next(check.detail for check in report.checks if check.name == name)


def _adapted(after: str = "first", **options: object) -> tuple[oa.Model, oa.Model]:
    base = model_of(MLP)
    return base, oa.insert(base, after=after, **options)


@pytest.mark.parametrize("change", [1e-6, 1e-2, np.inf, np.nan])
def test_a_changed_weight_of_the_base_fails(change: float) -> None:
    base, adapted = _adapted()
    tensor = next(t for t in adapted.proto.graph.initializer if t.name == "w1")
    value = weight(base, "w1").copy()
    value[0, 0] += change
    tensor.CopyFrom(numpy_helper.from_array(value, "w1"))
    report = oa.verify(base, adapted)
    assert "off" in _failed(report)
    assert "bit for bit" not in _detail(report, "off")


def test_a_changed_weight_that_these_inputs_do_not_reach_fails() -> None:
    base = model_of(BRANCHES)
    adapted = oa.insert(base, after="before")
    body = adapted.proto.graph.node[-1].attribute[1].g
    assert body.node[0].name == "no"
    body.node[0].input[1] = "w1"
    inputs = {"x": X, "c": np.array(True)}
    assert not oa.verify(base, adapted, inputs=inputs).passed


def _drop_output(proto: onnx.ModelProto) -> None:
    del proto.graph.output[1]


def _add_output(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(helper.make_tensor_value_info("b", 1, ["n", 4]))


def _rename_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "z"


def _add_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("more", 1, [1]))


def _input_type(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE


def _input_shape(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def _input_symbol(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def _output_shape(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.ClearField("shape")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_output, "output 'a' is gone"),
        (_add_output, "output 'b' is new"),
        (_rename_output, "output 'y' is gone"),
        (_add_input, "input 'more' is new"),
        (_input_type, "input 'x' was"),
        (_input_shape, "input 'x' was"),
        (_input_symbol, "input 'x' was"),
        (_output_shape, "output 'y' was"),
    ],
)
def test_another_interface_fails(
    change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    base = model_of(MLP.replace("=> (float[n,4] y)", "=> (float[n,4] y, float[n,4] a)"))
    adapted = oa.insert(base, after="act")
    change(adapted.proto)
    report = oa.verify(base, adapted)
    assert "interface" in _failed(report)
    assert message in _detail(report, "interface")


def _sub(adapted: oa.Model) -> None:
    node_of(adapted, "a").op_type = "Sub"


def _tanh(adapted: oa.Model) -> None:
    node_of(adapted, "adapter.first/act").op_type = "Tanh"


def _leaky(adapted: oa.Model) -> None:
    node = node_of(adapted, "adapter.first/act")
    node.op_type = "LeakyRelu"
    node.attribute.append(helper.make_attribute("alpha", 1e-3))


def _skipped_activation(adapted: oa.Model) -> None:
    node_of(adapted, "adapter.first/up").input[0] = "adapter.first/down"


def _other_source(adapted: oa.Model) -> None:
    node_of(adapted, "adapter.first/down").input[0] = "x"


def _other_target(adapted: oa.Model) -> None:
    node_of(adapted, "a").input[0] = "x"


def _transposed(adapted: oa.Model) -> None:
    nodes = adapted.proto.graph.node
    place = list(nodes).index(node_of(adapted, "adapter.first/up"))
    nodes[place].input[1] = "turned"
    nodes.insert(place, helper.make_node("Transpose", ["adapter.first.up"], ["turned"]))


def _swapped(adapted: oa.Model) -> None:
    node_of(adapted, "adapter.first/down").input[1] = "adapter.first.up"
    node_of(adapted, "adapter.first/up").input[1] = "adapter.first.down"


def _doubled(adapted: oa.Model) -> None:
    node_of(adapted, "a").input[0] = "adapter.first/up"


@pytest.mark.parametrize(
    "rewire",
    [_sub, _tanh, _leaky, _skipped_activation, _other_source],
)
def test_a_rewired_slot_is_not_its_formula(rewire: Callable[[oa.Model], None]) -> None:
    base, adapted = _adapted(bottleneck=4)
    rewire(adapted)
    report = oa.verify(base, adapted, inputs={"x": X})
    assert "on" in _failed(report)
    assert "'first'" in _detail(report, "on")
    assert report.slots[0].error > report.slots[0].tolerance


@pytest.mark.parametrize("rewire", [_transposed, _swapped])
def test_a_slot_that_does_not_run_when_it_is_on_fails_and_is_named(
    rewire: Callable[[oa.Model], None],
) -> None:
    base, adapted = _adapted(bottleneck=4)
    rewire(adapted)
    report = oa.verify(base, adapted, inputs={"x": X})
    assert "on" in _failed(report)
    assert "'first'" in _detail(report, "on")


@pytest.mark.parametrize("rewire", [_other_target, _doubled])
def test_a_slot_that_loses_its_target_fails_when_off_and_when_on(
    rewire: Callable[[oa.Model], None],
) -> None:
    base, adapted = _adapted()
    rewire(adapted)
    assert {"off", "on"} <= _failed(oa.verify(base, adapted, inputs={"x": X}))


def test_a_slot_with_the_weights_of_another_fails() -> None:
    base, adapted = _adapted(after=["first", "act"])
    node_of(adapted, "adapter.first/down").input[1] = "adapter.act.down"
    node_of(adapted, "adapter.first/up").input[1] = "adapter.act.up"
    assert "on" in _failed(oa.verify(base, adapted, inputs={"x": X}))


def test_an_ia3_slot_that_divides_fails() -> None:
    base, adapted = _adapted(parts="scale")
    node_of(adapted, "a").op_type = "Div"
    assert "on" in _failed(oa.verify(base, adapted, inputs={"x": X}))


def test_a_slot_that_nothing_reads_fails() -> None:
    base, adapted = _adapted()
    node_of(adapted, "b").input[0] = "adapter.first/target"
    report = oa.verify(base, adapted, inputs={"x": X})
    assert _failed(report) == {"graph", "effect"}
    assert "0 of 1" in _detail(report, "effect")


def test_one_of_two_slots_that_moves_nothing_is_named_and_with_strict_fails() -> None:
    base = model_of(SILENCED)
    adapted = oa.insert(base, after=["first", "second"])
    report = oa.verify(base, adapted, inputs={"x": X})
    assert report.passed
    assert ["'first'" in text and "moves no output" in text for text in report.warnings] == [
        True
    ]
    strict = oa.verify(base, adapted, inputs={"x": X}, strict=True)
    assert not strict.passed
    with pytest.raises(MismatchError, match="'first' moves no output"):
        strict.raise_for_mismatch()


def test_a_slot_that_one_of_two_readers_bypasses_fails() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y, float[n,4] z) <{dense("w1")}>
    {{ [first] a = MatMul(x, w1)  y = Neg(a)  z = Abs(a) }}""")
    adapted = oa.insert(base, after="first")
    node_of(adapted, "z").input[0] = "adapter.first/target"
    assert not oa.verify(base, adapted, inputs={"x": X}).passed


def test_a_slot_before_a_product_with_zero_moves_nothing() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, float[1] zero = {{0}}> {{
      [first] a = MatMul(x, w1)  none = Mul(a, zero)
      h = Add(none, x)  [second] y = MatMul(h, w1)
    }}""")
    assert "effect" in _failed(oa.verify(base, oa.insert(base, after="first")))
    both = oa.insert(base, after=["first", "second"])
    report = oa.verify(base, both)
    assert report.passed
    assert [slot.effect == 0 for slot in report.slots] == [True, False]
    assert not oa.verify(base, both, strict=True).passed


def test_what_the_checker_newly_says_fails() -> None:
    base, adapted = _adapted()
    adapted.proto.graph.value_info.append(helper.make_tensor_value_info("b", 1, ["n", 5]))
    report = oa.verify(base, adapted, inputs={"x": X})
    assert "checker" in _failed(report)
    assert "inference" in _detail(report, "checker")


def test_what_the_checker_said_of_the_base_already_passes() -> None:
    base = model_of(MLP)
    base.proto.graph.value_info.append(helper.make_tensor_value_info("b", 1, ["n", 5]))
    assert oa.verify(base, oa.insert(base, after="first"), inputs={"x": X}).passed


def test_a_nan_among_the_weights_of_a_slot_fails() -> None:
    base, adapted = _adapted(bottleneck=2)
    up = np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])
    filled = fill_weights(adapted, {"first": {"down": np.ones((4, 2)), "up": up}})
    report = oa.verify(base, filled, inputs={"x": X})
    assert "on" in _failed(report)


def test_inputs_of_nan_prove_nothing() -> None:
    base, adapted = _adapted()
    report = oa.verify(base, adapted, inputs={"x": np.full_like(X, np.nan)})
    assert "on" in _failed(report)
    assert report.warnings[0] == "slot 'first' reads no finite number with these inputs"


def test_a_nan_on_one_side_only_fails() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}, float[1] big = {{3e38}}>
    {{ [first] a = MatMul(x, w1)  b = Mul(a, a)  y = Mul(b, big) }}""")
    adapted = oa.insert(base, after="first")
    node_of(adapted, "y").op_type = "Pow"  # infinite where the base is not, and the reverse
    node_of(adapted, "y").input[0] = "a"
    report = oa.verify(base, adapted, inputs={"x": X})
    assert "off" in _failed(report)


def test_integer_outputs_that_differ_by_one_in_many_fail() -> None:
    base = model_of("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (int64[n,4] y) <float[1] many = {1e6}, int64[1] one = {0}> {
      [first] a = Mul(x, many)  r = Cast<to = 7>(a)  y = Add(r, one) }""")
    adapted = oa.insert(base, after="first")
    tensor = next(t for t in adapted.proto.graph.initializer if t.name == "one")
    tensor.CopyFrom(numpy_helper.from_array(np.array([1]), "one"))
    assert "off" in _failed(oa.verify(base, adapted, inputs={"x": X}))


def test_a_base_that_draws_random_numbers_is_named_as_the_reason() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}>
    {{ [first] a = MatMul(x, w1)  r = RandomNormalLike(a)  y = Add(a, r) }}""")
    report = oa.verify(base, oa.insert(base, after="first"), inputs={"x": X})
    assert "off" in _failed(report)
    assert "the base itself gives different outputs each time" in _detail(report, "off")


def test_another_base_fails() -> None:
    _, adapted = _adapted()
    other = model_of(MLP.replace("Relu", "Abs"))
    assert "off" in _failed(oa.verify(other, adapted, inputs={"x": X}))


def test_an_adapted_model_that_does_not_load_is_a_failed_proof_with_the_reason() -> None:
    base, adapted = _adapted(batched=True)
    adapted.proto.ir_version = 99
    for weights in (True, False):
        report = oa.verify(base, adapted, weights=weights)
        assert "off" in _failed(report)
        assert "99" in _detail(report, "off")
        assert {check.name for check in report.checks} >= {"interface", "graph", "checker"}
