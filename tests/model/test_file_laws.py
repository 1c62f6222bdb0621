"""Laws of files: a model saved as it was opened is the same bytes, and so is one whose slots
went in and came out, whatever else is in it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from disk_models import chunk, raw, sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from random_programs import places, programs
from test_wire import tensor_protos

import onnx_adapt as oa
from onnx_adapt.model import payloads

LAW = settings(max_examples=30, deadline=None, database=None, derandomize=True)


@st.composite
def models(draw: st.DrawFn) -> onnx.ModelProto:
    """A random program, with whatever else a model may hold beside it."""
    model = draw(programs(wild=True)).model().proto
    graph = model.graph
    if draw(st.booleans()):  # an IR before 4 lists its weights as inputs
        model.ir_version = 3
        for tensor in graph.initializer:
            value = helper.make_tensor_value_info(tensor.name, TensorProto.DOUBLE, tensor.dims)
            graph.input.insert(draw(st.integers(0, len(graph.input))), value)
    for number, tensor in enumerate(draw(st.lists(tensor_protos(), max_size=3))):
        if tensor.HasField("name") and draw(st.booleans()):
            tensor.name = f"extra{number}"
        else:
            tensor.ClearField("name")
        tensor.ClearField("data_location")
        graph.initializer.append(tensor)
    if draw(st.booleans()):
        graph.sparse_initializer.append(sparse("scattered", 3))
    if draw(st.booleans()):
        model.training_info.add().algorithm.initializer.append(raw("trained", 4))
    for entry in draw(st.lists(st.sampled_from(["a", "", "onnx_adapt_not"]), max_size=3)):
        model.metadata_props.add(key=entry, value=draw(st.text("aé\n", max_size=4)))
    if draw(st.booleans()):
        note = graph.quantization_annotation.add(tensor_name=graph.node[0].output[0])
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w1")
    for message in draw(st.lists(st.sampled_from([model, graph, graph.node[-1]]), max_size=2)):
        message.MergeFromString(chunk(draw(st.integers(200, 4000)), b"later"))
    return model


@pytest.mark.parametrize("large", [24, 4096])
def test_files_come_back_byte_for_byte(large: int, tmp_path: Path) -> None:
    path, adapted, back = (tmp_path / f"{name}.onnx" for name in ("m", "adapted", "back"))

    @LAW
    @given(models(), st.data())
    def law(proto: onnx.ModelProto, data: st.DataObject) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(payloads, "LARGE", large)
            path.write_bytes(proto.SerializeToString())
            base = oa.open_model(path)
            assert base.canonical
            oa.save_model(base, back)
            assert back.read_bytes() == path.read_bytes()
            model = base
            for _ in range(data.draw(st.integers(1, 2))):
                after = data.draw(st.sampled_from(places(model)))
                oa.save_model(oa.insert(model, after=after), adapted, overwrite=True)
                model = oa.open_model(adapted)
            names = [slot.name for slot in oa.list_slots(model)]
            first = data.draw(st.sampled_from([None, names[0], names[-1]]))
            less = oa.remove(model, slots=first)
            oa.save_model(oa.remove(less) if oa.list_slots(less) else less, back)
            assert back.read_bytes() == path.read_bytes()
            assert onnx.load(adapted).graph.quantization_annotation == list(
                proto.graph.quantization_annotation
            )

    law()
