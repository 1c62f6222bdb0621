"""Shapes recorded inside slots: which have the bottleneck of one adapter in them."""

import onnx
import pytest
from adapter_models import adapted
from onnx import helper, shape_inference
from slot_models import dense, model_of
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.edit.damage import damages


def _record(proto: onnx.ModelProto, name: str, shape: list[int | str]) -> None:
    recorded = {value.name: value for value in proto.graph.value_info}
    recorded[name] = helper.make_tensor_value_info(name, 1, shape)
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(recorded.values())


@pytest.mark.parametrize(
    "name", ["ah_bert_opset14_flags", "ah_bert_gating", "peft_convnet_lora"]
)
def test_shapes_that_onnx_infers_are_not_stale_whatever_the_form_of_the_slot(
    name: str,
) -> None:
    """A coupling has halves, a spelled-out normalisation means, channels are not last."""
    case = CASES[name]
    base = oa.open_model(case.base)
    checkpoint = oa.load_checkpoint(case.adapter, base)
    model = oa.insert_checkpoint(base, checkpoint)
    model.proto.graph.CopyFrom(shape_inference.infer_shapes(model.proto).graph)
    assert damages(model) == []


@pytest.mark.parametrize("baked", [True, False])
def test_a_bottleneck_that_is_fixed_may_be_recorded(baked: bool) -> None:
    model = adapted(bottleneck=3, baked=baked)
    inferred = shape_inference.infer_shapes(model.proto)
    assert "adapter.fc1/down" in {value.name for value in inferred.graph.value_info}
    assert damages(oa.Model(inferred)) == []


def test_a_source_of_another_width_is_no_bottleneck() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 14]>
    g (float[n,4] x) => (float[n,6] y)
    <{dense("w")}, float[4,6] v = {{{", ".join(["1", "-1", "2"] * 8)}}}>
    {{ [one] a = MatMul(x, w)  [two] y = MatMul(a, v) }}""")
    model = oa.insert(base, after="two", source="one", parts=("down", "up", "norm_weight"))
    assert damages(oa.Model(shape_inference.infer_shapes(model.proto))) == []


def test_shapes_inside_a_slot_on_channels_can_be_stale() -> None:
    base = model_of("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,1,9,9] x) => (float[n,4,9,9] y) <float[4,1,1,1] w = {1, 2, 3, 4}>
    { [fc1] y = Conv(x, w) }""")
    model = oa.insert(base, after="fc1")
    for size, stale in (("r", 0), (3, 1)):
        _record(model.proto, "adapter.fc1/down", ["n", size, 9, 9])
        assert len(damages(model)) == stale


def test_a_fixed_length_of_the_sequence_is_no_bottleneck() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,7,4] x) => (float[n,7,4] y) <{dense("w")}> {{ [fc1] y = MatMul(x, w) }}""")
    model = oa.insert(base, after="fc1")
    inferred = shape_inference.infer_shapes(model.proto)
    assert "adapter.fc1/down" in {value.name for value in inferred.graph.value_info}
    assert damages(oa.Model(inferred)) == []


def test_means_of_a_slot_named_after_a_down_projection_are_not_stale() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 14]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w")}> {{ [mlp] y = MatMul(x, w) }}""")
    base.proto.graph.node[0].name = name = "mlp/down/MatMul"
    model = oa.insert(base, after=name, parts=("down", "up", "norm_weight"))
    assert [slot.name for slot in oa.list_slots(model)] == [name]
    inferred = shape_inference.infer_shapes(model.proto)
    assert damages(oa.Model(inferred)) == []
    _record(inferred, f"adapter.{name}/down", ["n", 2])
    assert len(damages(oa.Model(inferred))) == 1
