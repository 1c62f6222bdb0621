"""Numbers in files that are made to fill the memory, to take for ever, or to overflow."""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import flatbuffers
import numpy as np
import onnx
import pytest
import safetensors.numpy
from adapter_models import npy_file, onnx_adapter_file, peak
from disk_models import chunk, dense, refer, varint, write
from onnx import helper
from waiting import LONG

import onnx_adapt as oa
from onnx_adapt.checkpoints.readers.peft_settings import refuse_slow
from onnx_adapt.errors import AdapterError, AdaptError, CheckpointError, ModelFileError
from onnx_adapt.model import walk
from onnx_adapt.proof.feeds import read_arrays

MB = 1 << 20


def _refused_soon(action: Callable[[], object], *, memory: int = 8 * MB) -> AdaptError:
    """An action that is refused before it has cost anything."""
    caught: list[AdaptError] = []

    def attempt() -> None:
        with pytest.raises(AdaptError) as error:
            action()
        caught.append(error.value)

    started = time.process_time()
    assert peak(attempt) < memory
    assert time.process_time() - started < 4
    assert len(str(caught[0])) < 10_000
    return caught[0]


# Models.


def _external(folder: Path, dims: list[int], **entries: str) -> Path:
    model = dense()
    tensor = model.graph.initializer.add(name="X", data_type=1, dims=dims)
    refer(tensor, location="w.bin", **entries)
    write(folder / "w.bin", bytes(64))
    return write(folder / "m.onnx", model)


@pytest.mark.parametrize(
    ("dims", "entries"),
    [
        ([2**62] * 1000, {}),
        ([2**63 - 1] * 20_000, {}),
        ([16], {"offset": str(2**64)}),
        ([16], {"offset": "9" * 4299, "length": "9" * 4300}),
        ([16], {"offset": "1" * 5000}),
        ([16], {"offset": "32"}),
        ([16], {"offset": "0", "length": str(2**62)}),
        ([16], {"offset": "-1"}),
        ([17], {}),
    ],
    ids=[
        *("a thousand axes", "20000 axes", "offset of 2^64", "end of 4301 digits"),
        *("5000 digits", "past the end", "length of 2^62", "negative", "one too many"),
    ],
)
def test_external_data_that_cannot_be_is_refused(
    dims: list[int], entries: dict[str, str], tmp_path: Path
) -> None:
    path = _external(tmp_path, dims, **entries)
    error = _refused_soon(lambda: oa.open_model(path))
    assert isinstance(error, ModelFileError)
    assert "'X'" in error.message


def test_ranges_of_external_data_may_overlap_and_are_kept(tmp_path: Path) -> None:
    path = _external(tmp_path, [8], offset="0", length="32")
    model = onnx.load(path, load_external_data=False)
    again = model.graph.initializer.add()
    again.CopyFrom(model.graph.initializer[1])
    again.name, again.external_data[1].value = "Y", "16"
    write(path, model)
    oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("inside", ["model", "graph", "tensor"])
def test_many_tiny_fields_take_memory_in_proportion(inside: str, tmp_path: Path) -> None:
    tiny = b"\xd0\x0f\x00" * 100_000  # field 250, which nobody knows
    tensor = dense().graph.initializer[0].SerializeToString() + tiny
    data = {
        "model": tiny,
        "graph": chunk(7, tiny),
        "tensor": chunk(7, chunk(5, tensor)),
    }[inside]
    path = write(tmp_path / "m.onnx", dense().SerializeToString() + data)
    assert peak(lambda: oa.open_model(path)) < 4 * MB


def test_a_length_that_overflows_is_refused(tmp_path: Path) -> None:
    for length in (2**63, 2**64 - 1, 2**64, 2**70 - 1):
        data = dense().SerializeToString() + b"\x3a" + varint(length)
        _refused_soon(lambda data=data: oa.open_model(write(tmp_path / "m.onnx", data)))


def test_a_long_name_around_many_bodies_is_not_repeated_in_full(tmp_path: Path) -> None:
    inner = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", 1, None)])
    nodes = [helper.make_node("If", ["c"], [f"t{i}"], then_branch=inner) for i in range(300)]
    body = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("t0", 1, None)])
    model = dense(width=2)
    owner = helper.make_node("If", ["c"], ["z"], name="n" * MB, then_branch=body)
    model.graph.node.append(owner)
    opened = oa.open_model(write(tmp_path / "m.onnx", model))
    assert peak(lambda: oa.list_slots(opened)) < 4 * MB
    assert peak(lambda: oa.find_sites(opened)) < 16 * MB


def test_a_long_name_of_an_attribute_with_bodies_is_not_repeated(
    tmp_path: Path,
) -> None:
    inner = helper.make_graph([], "b", [], [helper.make_tensor_value_info("x", 1, None)])
    nodes = [helper.make_node("If", ["c"], [f"t{i}"], then_branch=inner) for i in range(300)]
    body = helper.make_graph(nodes, "b", [], [helper.make_tensor_value_info("t0", 1, None)])
    model = dense(width=2)
    owner = model.graph.node.add(op_type="If", input=["c"], output=["z"])
    for end in "ab":
        held = owner.attribute.add(name="n" * MB + end, type=onnx.AttributeProto.GRAPH)
        held.g.CopyFrom(body)
    opened = oa.open_model(write(tmp_path / "m.onnx", model))
    assert peak(lambda: oa.find_sites(opened)) < 32 * MB
    assert len(list(walk.scopes(opened.proto.graph))) == 1 + 2 + 2 * 300


def _doubling(how: str) -> onnx.ModelProto:
    """A model of some kilobytes, whose tensors have 2**40 axes."""
    model = dense(width=2)
    model.graph.input.append(helper.make_tensor_value_info("t0", 7, [1, 1]))
    if how == "numbers":
        model.graph.node.add(op_type="Shape", input=["x"], output=["t0"])
        del model.graph.input[-1]
    for i in range(40):
        twice, made = [f"t{i}", f"t{i}"], [f"t{i + 1}"]
        node = helper.make_node("Gather", twice, made)
        if how == "numbers":
            node = helper.make_node("Concat", twice, made, axis=0)
        if how == "bodies":
            graph = helper.make_graph(
                [helper.make_node("Gather", twice, ["g"])],
                "b",
                [],
                [onnx.ValueInfoProto(name="g")],
            )
            node = helper.make_node("If", ["c"], made, then_branch=graph, else_branch=graph)
        if how == "functions":
            node = helper.make_node("F", twice[:1], made, domain="d")
        model.graph.node.append(node)
    if how == "functions":
        body = [helper.make_node("Gather", ["a", "a"], ["b"])]
        opset = helper.make_opsetid("", 17)
        model.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, [opset]))
        model.opset_import.append(helper.make_opsetid("d", 1))
    return model


def _listed(model: onnx.ModelProto, folder: Path) -> None:
    """List the sites in a process that has not much memory, or time."""
    code = (
        "import resource, sys, onnx_adapt as oa\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({2048 * MB}, {2048 * MB}))\n"
        "print(*(site.address for site in oa.find_sites(oa.open_model(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(folder / "m.onnx", model))],
        capture_output=True, text=True, timeout=LONG, check=True,
    )  # fmt: skip
    assert done.stdout.split()[0] == "main:y"


@pytest.mark.parametrize("how", ["axes", "numbers", "bodies", "functions"])
def test_shapes_that_double_at_each_node_do_not_fill_the_memory(
    how: str, tmp_path: Path
) -> None:
    _listed(_doubling(how), tmp_path)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_a_shape_of_many_axes_is_not_copied_for_each_node(what: str, tmp_path: Path) -> None:
    model = dense(width=2)
    if what == "input":
        model.graph.input.append(helper.make_tensor_value_info("t0", 1, [1] * 50_000))
    else:
        model.graph.initializer.add(name="t0", data_type=1, dims=[1] * 50_000)
    for i in range(5000):
        model.graph.node.add(op_type="Transpose", input=[f"t{i}"], output=[f"t{i + 1}"])
    _listed(model, tmp_path)


def test_functions_far_inside_each_other_are_no_traceback(tmp_path: Path) -> None:
    model = dense(width=2)
    model.opset_import.append(helper.make_opsetid("d", 1))
    opsets = list(model.opset_import)
    for i in range(5000):
        body = [helper.make_node(f"F{i - 1}", ["a"], ["b"], domain="d")]
        if not i:
            body = [helper.make_node("Relu", ["a"], ["b"])]
        model.functions.append(helper.make_function("d", f"F{i}", ["a"], ["b"], body, opsets))
    model.graph.node.add(op_type="F4999", domain="d", input=["x"], output=["z"])
    _listed(model, tmp_path)


def test_a_name_of_many_modules_is_not_taken_apart(tmp_path: Path) -> None:
    model = dense(width=2)
    model.graph.node[0].name = "/a" * 20_000 + "/MatMul"
    opened = oa.open_model(write(tmp_path / "m.onnx", model))
    assert peak(lambda: oa.find_sites(opened)) < 8 * MB


def test_a_tensor_s_name_of_many_dots_is_not_taken_apart_for_slots(tmp_path: Path) -> None:
    model = dense(width=2)
    model.graph.node.add(op_type="Relu", input=["x"], output=["adapter." + "." * 100_000])
    base = oa.open_model(write(tmp_path / "m.onnx", model))
    assert peak(lambda: oa.insert(base, after="dense")) < 16 * MB


def test_a_name_that_is_not_there_is_not_compared_with_endless_ones(tmp_path: Path) -> None:
    model = dense(width=2)
    for i in range(200):
        model.graph.node.add(op_type="Relu", input=["x"], output=[f"t{i}"], name="o" * 20_000)
    base = oa.open_model(write(tmp_path / "m.onnx", model))
    error = _refused_soon(lambda: oa.insert(base, after="o" * 60 + "z"), memory=64 * MB)
    assert len(error.hint) < 10_000


def test_a_graph_of_many_nodes_takes_time_in_proportion(tmp_path: Path) -> None:
    model = dense(width=2)
    for i in range(10_000):
        model.graph.node.add(op_type="Relu", input=["x"], output=[f"t{i}"])
    base = oa.open_model(write(tmp_path / "m.onnx", model))
    started = time.process_time()
    adapted = oa.insert(base, after="dense")
    assert oa.remove(adapted).proto == base.proto
    assert time.process_time() - started < 6


def test_bodies_inside_each_other_without_end_are_refused(tmp_path: Path) -> None:
    heads, size = [], 0
    for _ in range(100_000):  # from the inside: a graph in an attribute in a node in a graph
        for number in (6, 5, 1):
            heads.append(varint(number << 3 | 2) + varint(size))
            size += len(heads[-1])
    graph = b"".join(reversed(heads))
    path = write(tmp_path / "m.onnx", dense().SerializeToString() + chunk(7, graph))
    _refused_soon(lambda: oa.open_model(path))


# Records of slots.


def _with_record(change: dict[str, object]) -> oa.Model:
    from adapter_models import adapted

    model = adapted()
    (entry,) = model.proto.metadata_props
    record = json.loads(entry.value)
    record["slots"][0] |= change
    entry.value = json.dumps(record)
    return model


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 10**12, "axis": 1},
        {"rank": -3, "axis": 1},
        {"axis": 7},
        {"width": 2**70},
        {"width": -4},
        {"source_width": 10**30},
        {"bottleneck": 2**64},
        {"window": [2**63]},
        {"window": [1, 2, 3, 4], "axis": 1, "rank": 3},
        {"name": "half \ud800 a character"},
        {"parts": []},
        {"parts": ["up"]},
        {"parts": ["nonsense"]},
        {"parts": ["down", "up", "f_down"]},
    ],
    ids=str,
)
def test_a_record_of_a_slot_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    model = _with_record(change)
    _refused_soon(lambda: oa.remove(model))
    _refused_soon(lambda: oa.verify(model, model))


def _stacked(names: list[tuple[str, str]]) -> oa.Model:
    """A model whose record has a slot from each tensor to the one beside it."""
    model = _with_record({})
    (entry,) = model.proto.metadata_props
    record = json.loads(entry.value)
    whole = record["slots"][0]
    for i, (inner, output) in enumerate(names):
        record["slots"].append(whole | {"name": f"s{i}", "inner": inner, "output": output})
        model.proto.graph.node.add(op_type="Relu", input=["x"], output=[output])
    entry.value = json.dumps(record)
    return model


def test_slots_that_are_stacked_in_a_circle_are_refused() -> None:
    model = _stacked([("t0", "t1"), ("t1", "t2"), ("t2", "t0")])
    error = _refused_soon(lambda: oa.find_sites(model))
    assert "stacked in a circle" in error.message


def test_a_high_stack_of_slots_takes_time_in_proportion() -> None:
    model = _stacked([(f"t{i}", f"t{i + 1}") for i in range(5000)])
    started = time.process_time()
    oa.find_sites(model, all_tensors=True)
    assert time.process_time() - started < 4


@pytest.mark.parametrize("version", [2**63, -(10**30)])
def test_a_base_of_an_ir_version_that_cannot_be_is_refused(version: int) -> None:
    model = _with_record({})
    (entry,) = model.proto.metadata_props
    record = json.loads(entry.value)
    record["base"]["ir_version"] = version
    entry.value = json.dumps(record)
    _refused_soon(lambda: oa.remove(model))


# Adapters and inputs.


def _lzma(dictionary: int) -> bytes:
    """An archive with an LZMA member that asks for so large a dictionary."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(
            "a.npy", npy_file(b"{'descr':'<f4','fortran_order':False,'shape':()}")
        )
    data = bytearray(out.getvalue())
    at = data.index(b"\x09\x04\x05\x00\x5d") + 5
    data[at : at + 4] = struct.pack("<I", dictionary)
    return bytes(data)


def test_a_member_that_asks_for_a_dictionary_of_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(_lzma(0xF0000000))
    assert isinstance(_refused_soon(lambda: oa.load_adapter(path)), AdapterError)
    _refused_soon(lambda: read_arrays(path))


def _overlapping_names(count: int, length: int) -> bytes:
    """An .onnx_adapter file whose names are windows of one text."""
    data = bytearray(onnx_adapter_file([("abcd", [1], 1, bytes(4))] * count, shared=count))
    table = flatbuffers.encode.Get(flatbuffers.packer.uoffset, data, 0)
    tail = len(data)
    data += struct.pack("<I", length) * count + b"z" * length  # each name another one
    vtable = table - struct.unpack_from("<i", data, table)[0]
    vector = table + struct.unpack_from("<H", data, vtable + 10)[0]
    vector += struct.unpack_from("<I", data, vector)[0]
    for i in range(count):
        at = vector + 4 + 4 * i
        item = at + struct.unpack_from("<I", data, at)[0]
        offset = struct.unpack_from(
            "<H", data, item - struct.unpack_from("<i", data, item)[0] + 4
        )
        label = item + offset[0]
        struct.pack_into("<I", data, label, tail + 4 * i - label)
    return bytes(data)


def test_names_inside_each_other_are_not_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(_overlapping_names(2000, 0x4040))
    error = _refused_soon(lambda: oa.load_adapter(path), memory=2 * MB)
    assert "names" in error.message


INPUTS = {
    "an array without a name": npy_file(
        b"{'descr':'<f4','fortran_order':False,'shape':(1,)}\n", bytes(4)
    ),
    "text": b"hello",
    "a deflated member that is damaged": b"",
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_of_another_kind_are_refused(what: str, tmp_path: Path) -> None:
    path, data = tmp_path / "in.npz", INPUTS[what]
    if not data:
        np.savez_compressed(path, x=np.arange(100.0))
        data = path.read_bytes()
        data = data[:200] + bytes(40) + data[240:]
    path.write_bytes(data)
    _refused_soon(lambda: read_arrays(path))


def test_inputs_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    arrays = {
        "x": np.arange(6.0).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3)),
        "t": np.array(["a", "bc"]),
        "b/c": np.array(True),
        "n": np.zeros((0, 3), np.float16),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "in.npz", **arrays)
        found = read_arrays(tmp_path / "in.npz")
        with np.load(tmp_path / "in.npz") as theirs:
            assert sorted(found) == sorted(theirs.files)
            for name, value in found.items():
                assert value.dtype == theirs[name].dtype
                assert value.flags.writeable
                np.testing.assert_array_equal(value, theirs[name])


ENDLESS = """
import sys, onnx_adapt as oa
from pathlib import Path
from onnx_adapt.checkpoints.readers.saved import read_state_dict
from onnx_adapt.proof.feeds import read_arrays
from onnx_adapt.session.ort_adapter import read
path = Path(sys.argv[1])
readers = {".npz": [read_arrays, oa.load_adapter], ".bin": [read_state_dict]}
for reader in readers.get(path.suffix, [oa.load_adapter, read, read_state_dict]):
    try:
        reader(path)
    except oa.AdaptError:
        print("refused")
"""


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".onnx_adapter", ".bin"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_file_that_does_not_end_is_not_read(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    done = subprocess.run(
        [sys.executable, "-c", ENDLESS, str(path)],
        capture_output=True, text=True, timeout=LONG, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == {"refused"}


# Checkpoints.


def test_factors_that_make_a_huge_matrix_are_refused(tmp_path: Path) -> None:
    from adapter_models import saved_model

    place = "bert.encoder.layer.0.output.adapters.fr"
    tensors = {
        f"{place}.adapter_down.0.{name}": np.ones(shape, np.float32)
        for name, shape in {
            "W_left": (1, 40_000, 1),
            "W_right": (1, 1, 40_000),
            "phm_rule": (1, 1, 1),
        }.items()
    }
    config = {"config": {"phm_layer": True}, "name": "fr", "model_type": "bert"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, tmp_path / "adapter.safetensors")
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    error = _refused_soon(lambda: oa.load_checkpoint(tmp_path, base))
    assert isinstance(error, CheckpointError)
    assert "1600000000 numbers" in error.message


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a|a)*b", "(a{1,9}){2,99}b", ".*" * 5, "a" * 501),
        *("(a|a)" * 50 + "b", "(a|a){50}b", "(a?){50}b", "a?" * 60 + "b"),
    ],
)
def test_a_pattern_that_would_take_for_ever_is_refused(pattern: str, tmp_path: Path) -> None:
    from adapter_models import lora, peft_folder, saved_model

    tensors = lora(modules=["a" * 60])
    folder = peft_folder(tmp_path / "fr", tensors, alpha_pattern={pattern: 2})
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    error = _refused_soon(lambda: oa.load_checkpoint(folder, base))
    assert "too involved" in error.message


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a+)+b", "too involved"),
        ("(a|a)" * 50 + "b", "too involved"),
        ("(", "is no pattern"),
        ("a{99999999999999999999}", "is no pattern"),
    ],
)
def test_a_pattern_of_ia3_that_would_take_for_ever_or_is_none_is_refused(
    pattern: str, message: str, tmp_path: Path
) -> None:
    from adapter_models import peft_folder, saved_model

    tensors = {f"base_model.model.{'a' * 60}.ia3_l": np.ones((1, 1), np.float32)}
    folder = peft_folder(
        tmp_path / "fr", tensors, peft_type="IA3", feedforward_modules=pattern
    )
    base = oa.open_model(saved_model(tmp_path / "base.onnx"))
    error = _refused_soon(lambda: oa.load_checkpoint(folder, base))
    assert "feedforward_modules" in error.message
    assert message in error.message


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.(1|2)\.self_attn\.(q|k|v|o)_proj",
        r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"(?:model\.)?layers\.[0-9]+\.mlp(?:\.(?:up|down|gate)_proj)?",
    ],
)
def test_the_patterns_that_people_write_are_taken(pattern: str) -> None:
    refuse_slow(pattern, "model.layers.1.self_attn.q_proj")
