"""The wire format: damaged files are noticed, odd encodings are read right."""

import contextlib
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from disk_models import (
    chunk,
    dense,
    external,
    run,
    varint,
    weight,
    with_data_everywhere,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

import onnx_adapt as oa
from onnx_adapt.errors import ModelFileError
from onnx_adapt.model import payloads, splice, wire
from onnx_adapt.model.file import Model

MODELS = Path(__file__).parent.parent.parent / "models"
SOURCE = payloads.Source(Path("a file"), 0, 0)
LAWS = settings(max_examples=300, deadline=None, database=None, derandomize=True)


def refused(path: Path, data: bytes) -> str:
    """Open bytes that are no model and return what the error says."""
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        oa.open_model(path)
    assert caught.value.hint
    return caught.value.message


def opens_or_is_refused(path: Path, data: bytes) -> Model | None:
    """The model, or None where it is refused; any other exception fails the test."""
    path.write_bytes(data)
    with contextlib.suppress(ModelFileError):
        return oa.open_model(path)
    return None


@LAWS
@given(st.integers(0, 2**64 - 1), st.binary(max_size=3), st.integers(0, 3))
def test_a_number_is_read_as_it_was_written(value: int, after: bytes, pad: int) -> None:
    assert wire.varint(value) == varint(value)
    data = varint(value, min(pad, 10 - len(varint(value))))
    assert wire.read_varint(data + after, 0, len(data + after)) == (value, len(data))


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xff" * 9, b"\xff" * 10 + b"\x01"])
def test_a_number_that_does_not_end_is_refused(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="number"):
        wire.read_varint(data, 0, len(data))


@LAWS
@given(st.binary(max_size=40))
def test_the_fields_of_any_bytes_cover_them_without_gaps_or_are_refused(data: bytes) -> None:
    ends, whole = [0], False
    with contextlib.suppress(ModelFileError):
        for item in wire.fields(data, 0, len(data)):
            assert item.start == ends[-1] < item.payload <= item.end <= len(data)
            ends.append(item.end)
        whole = True
    assert whole == (ends[-1] == len(data))


@pytest.mark.parametrize(
    "data", [b"\x0b\x0c", b"\x0c", b"\x0e", b"\x0f", b"\x00\x00", b"\x02\x00"]
)
def test_groups_unused_types_and_field_zero_are_refused(data: bytes) -> None:
    with pytest.raises(ModelFileError, match="byte 0"):
        list(wire.fields(data, 0, len(data)))


@LAWS
@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_model_or_a_model_file_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    opens_or_is_refused(tmp_path_factory.getbasetemp() / "any.onnx", data)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with a few cuts, changes and insertions."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        gone = draw(st.integers(0, 3))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + gone :]
    return data


@pytest.mark.parametrize("large", [16, 4096])
@pytest.mark.parametrize("kind", ["inline", "external"])
def test_a_damaged_model_is_refused_or_is_read_as_protobuf_reads_it(
    kind: str, large: int, tmp_path: Path
) -> None:
    extra = numpy_helper.from_array(weight(9), "V")
    path = external(tmp_path / "m.onnx", "w.bin", extra)
    if kind == "inline":
        whole = dense(extra, width=4)
        write(path, whole)

    @LAWS
    @given(damaged(path.read_bytes()))
    def law(data: bytes) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(payloads, "LARGE", large)
            model = opens_or_is_refused(tmp_path / "d.onnx", data)
            if model is not None:
                oa.save_model(model, tmp_path / "copy.onnx")
                saved = (tmp_path / "copy.onnx").read_bytes()
                theirs = onnx.ModelProto.FromString(data).SerializeToString()
                assert onnx.ModelProto.FromString(saved).SerializeToString() == theirs
                assert saved == data or not model.canonical

    law()


def test_a_real_model_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    data = (MODELS / "dnsmos-p808.onnx").read_bytes()
    for length in random.Random(2).sample(range(len(data)), 200):
        assert "cut.onnx" in refused(tmp_path / "cut.onnx", data[:length])


def test_every_proper_beginning_of_a_model_is_refused(tmp_path: Path) -> None:
    data = dense(width=2).SerializeToString()
    graph_end = len(data) - len(chunk(8, dense().opset_import[0].SerializeToString()))
    for length in range(len(data)):
        if length != graph_end:
            refused(tmp_path / "cut.onnx", data[:length])


def test_a_model_cut_off_right_after_its_graph_is_refused(tmp_path: Path) -> None:
    data = dense().SerializeToString()
    opset = chunk(8, dense().opset_import[0].SerializeToString())
    assert data.endswith(opset)
    refused(tmp_path / "cut.onnx", data[: -len(opset)])


def test_damaged_typed_data_is_refused_as_protobuf_refuses_it(tmp_path: Path) -> None:
    tensor = TensorProto(name="V", data_type=1, dims=[1500]).SerializeToString()
    model = dense()
    graph = model.graph.SerializeToString() + chunk(5, tensor + chunk(4, bytes(6001)))
    model.ClearField("graph")
    refused(tmp_path / "m.onnx", model.SerializeToString() + chunk(7, graph))


def nested(depth: int) -> bytes:
    """A large tensor inside that many If bodies."""
    graph = chunk(5, numpy_helper.from_array(weight(64, 64), "deep").SerializeToString())
    for _ in range(depth):
        graph = chunk(1, chunk(4, b"If") + chunk(5, chunk(1, b"b") + chunk(6, graph)))
    head, tail = dense().SerializeToString(), dense().graph.SerializeToString()
    return head[:2] + chunk(7, tail + graph) + chunk(8, b"\x10\x11")


def test_bodies_are_opened_as_deep_as_protobuf_goes_and_no_deeper(tmp_path: Path) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", nested(30)))
    assert len(model.payloads) == 2
    oa.save_model(model, tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx") == onnx.load(tmp_path / "m.onnx")
    assert "nested" in refused(tmp_path / "deep.onnx", nested(3000))


def pieces(*tensors: TensorProto) -> bytes:
    """A Constant node whose value is given several times; protobuf merges them."""
    value = b"".join(chunk(5, tensor.SerializeToString()) for tensor in tensors)
    node = chunk(2, b"c") + chunk(4, b"Constant") + chunk(5, chunk(1, b"value") + value)
    graph = chunk(1, node) + dense().graph.SerializeToString()
    return b"\x08\x08" + chunk(7, graph) + chunk(8, b"\x10\x11")


RAW = TensorProto(raw_data=weight(1500).tobytes())
FLOATS = TensorProto(float_data=weight(1500, seed=1))
FEW = TensorProto(float_data=[7, 8, 9], raw_data=b"abcd")


@pytest.mark.parametrize(
    "tensors",
    [(RAW, RAW), (RAW, FEW), (FEW, RAW), (FLOATS, FEW), (FEW, FLOATS), (FLOATS, RAW)],
    ids=["raw raw", "raw few", "few raw", "floats few", "few floats", "floats raw"],
)
def test_a_tensor_in_several_pieces_is_merged_as_protobuf_merges_it(
    tensors: tuple[TensorProto, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", pieces(*tensors))
    model = oa.open_model(path)
    assert not model.canonical
    oa.save_model(model, tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx").graph.node[0] == onnx.load(path).graph.node[0]


@st.composite
def tensor_protos(draw: st.DrawFn) -> TensorProto:
    """A tensor with any of its fields, not always ones that belong together."""
    tensor = TensorProto(name=draw(st.sampled_from(["", "w", "a name"])))
    tensor.dims.extend(draw(st.lists(st.integers(-1, 2**40), max_size=3)))
    for field, values in {
        "raw_data": st.binary(max_size=60),
        "data_type": st.integers(0, 16),
        "data_location": st.sampled_from([0, 1]),
        "doc_string": st.text("äb", max_size=30),
    }.items():
        if draw(st.booleans()):
            setattr(tensor, field, draw(values))
    floats = st.lists(st.floats(width=32, allow_nan=False), max_size=12)
    for field, numbers in {
        "float_data": floats,
        "double_data": floats,
        "int64_data": st.lists(st.integers(-5, 2**50), max_size=9),
        "string_data": st.lists(st.binary(max_size=20), max_size=3),
    }.items():
        if draw(st.integers(0, 3)) == 0:
            getattr(tensor, field).extend(draw(numbers))
    if draw(st.booleans()):
        tensor.MergeFromString(chunk(draw(st.integers(40, 3000)), b"later"))
    return tensor


@LAWS
@given(st.lists(tensor_protos(), min_size=1, max_size=4), st.integers(0, 40))
def test_taking_data_out_and_putting_it_back_changes_nothing(
    tensors: list[TensorProto], large: int
) -> None:
    model = dense(*tensors, width=2)
    model.graph.node.add(op_type="If").attribute.add(name="b").g.initializer.extend(tensors)
    model.training_info.add().algorithm.sparse_initializer.add().values.CopyFrom(tensors[0])
    model.functions.add().attribute_proto.add().sparse_tensors.add().indices.CopyFrom(
        tensors[0]
    )
    data = model.SerializeToString()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(payloads, "LARGE", large)
        small, places, _ = splice.strip(data, SOURCE)
    small = onnx.ModelProto.FromString(small).SerializeToString()
    segments, size = splice.splice(small, places)
    whole = b"".join(
        s if isinstance(s, bytes) else data[s.offset : s.offset + s.length] for s in segments
    )
    assert whole == data
    assert size == len(data)


def test_a_stand_in_is_never_mistaken_for_data(tmp_path: Path) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", with_data_everywhere()))
    mark = model.proto.graph.initializer[0].raw_data
    assert payloads.token_index(mark) is not None
    fake = TensorProto(name="fake", data_type=2, dims=[24], raw_data=bytes(range(24)))
    again = oa.open_model(write(tmp_path / "f.onnx", dense(fake)))
    assert payloads.token_index(again.proto.graph.initializer[1].raw_data) is None
    np.testing.assert_array_equal(
        numpy_helper.to_array(again.proto.graph.initializer[1]), np.arange(24, dtype=np.uint8)
    )


def _odd(how: str) -> bytes:
    """The dense model, encoded as protobuf itself would not."""
    model = dense()
    graph, weights = model.graph, model.graph.initializer[0]
    tensor = weights.SerializeToString()
    dims = b"\x08\x40\x08\x40"
    assert tensor.startswith(dims)
    if how == "packed dims":
        tensor = chunk(1, b"\x40\x40") + tensor[len(dims) :]
    if how == "fields out of order":
        tensor = tensor[len(dims) :] + dims
    if how == "a field given twice":
        tensor = chunk(9, b"\0" * 16384) + tensor
    if how == "an unknown field first":
        tensor = chunk(300, b"later") + tensor
    node = graph.node[0].SerializeToString()
    rest = onnx.GraphProto.FromString(graph.SerializeToString())
    del rest.initializer[:], rest.node[:]
    rest.ClearField("name")
    pad = 2 if how == "long lengths" else 0
    if how == "long lengths in small messages":
        node = node.replace(chunk(4, b"MatMul"), chunk(4, b"MatMul", pad=1))
    head = chunk(1, node) + chunk(2, b"g")
    weights_field = chunk(5, tensor, pad)
    tail = rest.SerializeToString()
    opset = chunk(8, model.opset_import[0].SerializeToString())
    if how == "the graph in two pieces":
        return b"\x08\x08" + chunk(7, head + weights_field) + chunk(7, tail) + opset
    if how == "the graph last":
        return b"\x08\x08" + opset + chunk(7, head + weights_field + tail)
    if how == "a long number":
        return b"\x08" + varint(8, pad=3) + chunk(7, head + weights_field + tail) + opset
    return b"\x08\x08" + chunk(7, head + weights_field + tail) + opset


ODD = [
    "packed dims",
    "fields out of order",
    "a field given twice",
    "an unknown field first",
    "long lengths",
    "long lengths in small messages",
    "the graph in two pieces",
    "the graph last",
    "a long number",
]


def test_the_models_of_the_encoding_tests_differ_only_in_what_they_say(tmp_path: Path) -> None:
    assert _odd("") == dense().SerializeToString()
    assert oa.open_model(write(tmp_path / "m.onnx", _odd(""))).canonical


@pytest.mark.parametrize("how", ODD)
def test_an_unusual_encoding_is_noticed_and_the_model_stays_the_same(
    how: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", _odd(how))
    model = oa.open_model(path)
    assert not model.canonical
    oa.save_model(model, tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx") == onnx.load(path)
    inserted = run("insert", path, "--after", "dense")
    assert inserted.status == 0
    assert "not encoded as protobuf encodes it" in inserted.err
    removed = run("remove", tmp_path / "m.adapted.onnx", "-o", tmp_path / "back.onnx")
    assert removed.status == 0
    assert "byte for byte" not in removed.err
    assert onnx.load(tmp_path / "back.onnx") == onnx.load(path)
