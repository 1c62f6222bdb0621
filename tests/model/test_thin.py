"""Thin models: graph and slots alone, with every large weight left in the base's file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnxruntime
import pytest
from disk_models import (
    dense,
    external,
    files,
    process,
    raw,
    refused,
    run,
    sparse,
    typed,
    varint,
    weight,
    with_data_everywhere,
    write,
)
from onnx import TensorProto, helper, numpy_helper
from test_model_file import CORPUS
from waiting import LONG

import onnx_adapt as oa
from onnx_adapt.errors import ExternalDataError, ManifestError, RunError, SaveError
from onnx_adapt.model import file as model_file
from onnx_adapt.model import payloads

X = weight(2, 64, seed=9)
MODELS = Path(__file__).parent.parent.parent / "models"
REAL: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "dnsmos-p808": ("mos_estimator_small_1/dense_3/MatMul_add", {"input_1": (1, 900, 120)}),
    "plcmos": ("Gemm_*", {"degraded_audio": (1, 1, 75, 257), "rater_embed": (1, 64)}),
    "silero-vad-ifless": ("node_conv1d*", {"input": (1, 576), "state": (2, 1, 128)}),
}
"""For each model where its slots go, and the shapes of its inputs."""


def outputs(path: Path, **feeds: np.ndarray) -> list[Any]:
    """What ONNX Runtime says of a model in a file, as a server would load it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds or {"x": X})


def made_up(name: str) -> dict[str, np.ndarray]:
    feeds = {key: np.abs(weight(*shape)) for key, shape in REAL[name][1].items()}
    return feeds | ({"sr": np.array(16000)} if "state" in feeds else {})


def slotted(path: Path, **options: Any) -> oa.Model:
    kinds = {"after": "dense", "baked": True, "bottleneck": 2, **options}
    return oa.insert(oa.open_model(path), **kinds)


def thin_and_full(model: oa.Model, folder: Path) -> tuple[Path, Path]:
    thin = oa.save_model(model, folder / "thin.onnx", thin=True)
    return thin.path, oa.save_model(model, folder / "full.onnx").path


def locations(path: Path) -> dict[str, set[str]]:
    """The files that a model refers to, and the names of the tensors in each."""
    found: dict[str, set[str]] = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                found.setdefault(entry.value, set()).add(tensor.name)
    return found


@pytest.mark.parametrize("name", REAL)
def test_a_thin_model_is_the_full_one_to_everybody_who_reads_it(
    name: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base.onnx", (MODELS / f"{name}.onnx").read_bytes())
    feeds = made_up(name)
    model = slotted(base, after=REAL[name][0])
    thin, full = thin_and_full(model, tmp_path)
    onnx.checker.check_model(str(thin))
    assert (
        thin.stat().st_size < full.stat().st_size - sum(p.length for p in model.payloads) / 2
    )
    values = zip(
        onnx.load(thin).graph.initializer, onnx.load(full).graph.initializer, strict=True
    )
    for ours, theirs in values:
        np.testing.assert_array_equal(
            numpy_helper.to_array(ours), numpy_helper.to_array(theirs)
        )
    pairs = zip(outputs(thin, **feeds), outputs(full, **feeds), strict=True)
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert oa.verify(base, thin).passed


@pytest.mark.parametrize("name", REAL)
def test_a_thin_model_packed_is_the_full_one_byte_for_byte(name: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", (MODELS / f"{name}.onnx").read_bytes())
    thin, full = thin_and_full(slotted(base, after=REAL[name][0]), tmp_path)
    assert run("pack", thin, "-o", tmp_path / "packed.onnx").status == 0
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()


@pytest.mark.parametrize("name", REAL)
def test_removing_the_slots_of_a_thin_model_gives_the_base(name: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", (MODELS / f"{name}.onnx").read_bytes())
    thin, _ = thin_and_full(slotted(base, after=REAL[name][0], baked=False), tmp_path)
    removed = run("remove", thin, "-o", tmp_path / "back.onnx")
    assert "the base is back, byte for byte" in removed.err
    assert (tmp_path / "back.onnx").read_bytes() == base.read_bytes()


@pytest.mark.parametrize("shift", range(4))
def test_a_weight_may_begin_at_any_byte_of_the_base(shift: int, tmp_path: Path) -> None:
    proto = dense()
    proto.producer_name = "p" * shift
    base = write(tmp_path / "base.onnx", proto)
    thin, full = thin_and_full(slotted(base), tmp_path)
    (place,) = oa.open_model(base).payloads
    entries = onnx.load(thin, load_external_data=False).graph.initializer[0].external_data
    assert {e.key: e.value for e in entries} == {
        "location": "base.onnx",
        "offset": str(base.read_bytes().index(weight(64, 64).tobytes())),
        "length": str(place.length),
    }
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()


def test_large_tensors_everywhere_stay_in_the_base_but_sparse_ones(tmp_path: Path) -> None:
    base = oa.open_model(write(tmp_path / "base.onnx", with_data_everywhere()))
    thin, full = thin_and_full(base, tmp_path)
    left = oa.open_model(thin)
    inline = sum(place.source.path == thin for place in left.payloads)
    assert inline == 8  # four sparse tensors of indices and values
    assert len(left.payloads) == 27
    assert oa.save_model(left, tmp_path / "back.onnx").path.read_bytes() == full.read_bytes()
    assert full.read_bytes() == (tmp_path / "base.onnx").read_bytes()


def test_what_a_tensor_said_of_its_data_survives(tmp_path: Path) -> None:
    data = weight(1111).tobytes()
    odd = [TensorProto(name=n, data_type=1, dims=[1111], raw_data=data) for n in "DML"]
    odd[0].data_location = TensorProto.DEFAULT
    odd[1].metadata_props.add(key="who", value="me")
    odd[2].external_data.add(key="location", value="left over")
    kinds = (TensorProto.FLOAT, TensorProto.DOUBLE)
    numbers = [typed(f"T{kind}", kind, kind) for kind in kinds]
    whole = helper.make_tensor("I", TensorProto.INT32, [2000], range(2000))
    base = write(tmp_path / "base.onnx", dense(*odd, *numbers, whole))
    thin, full = thin_and_full(slotted(base), tmp_path)
    onnx.checker.check_model(str(thin))
    assert locations(thin) == {"base.onnx": {"W", *"DML", "T1", "T11"}}
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()
    oa.save_model(oa.remove(oa.open_model(thin)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == base.read_bytes()


def test_a_sparse_tensor_stays_inside_and_runs(tmp_path: Path) -> None:
    proto = dense()
    proto.graph.node.add(op_type="Identity", input=["S"], output=["s"])
    proto.graph.output.append(helper.make_tensor_value_info("s", 1, [9000]))
    proto.graph.sparse_initializer.append(sparse("S", 5))
    base = write(tmp_path / "base.onnx", proto)
    thin, full = thin_and_full(slotted(base), tmp_path)
    for ours, theirs in zip(outputs(thin), outputs(full), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_both_files_of_a_base_with_data_beside_it_are_borrowed(tmp_path: Path) -> None:
    base = external(tmp_path / "m.onnx", "w.bin", raw("V", 3))
    thin, full = thin_and_full(slotted(base), tmp_path)
    assert locations(thin) == {"w.bin": {"W"}, "m.onnx": {"V"}}
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()
    (tmp_path / "w.bin").write_bytes(weight(64, 64, seed=8).tobytes())
    with pytest.raises(ExternalDataError, match=r"w\.bin has changed since thin\.onnx"):
        oa.open_model(thin)


def test_where_all_data_is_beside_the_base_its_own_file_is_not_needed(tmp_path: Path) -> None:
    base = external(tmp_path / "m.onnx", "sub/w.bin")
    thin, full = thin_and_full(slotted(base), tmp_path)
    base.unlink()
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()
    assert oa.open_model(thin).weights_in == (tmp_path / "sub" / "w.bin",)
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()


def test_a_thin_model_of_a_thin_model_needs_the_base_alone(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    first = oa.save_model(slotted(base, bottleneck=64), tmp_path / "one.onnx", thin=True).path
    second = slotted(first, bottleneck=64, seed=1)
    thin, full = thin_and_full(second, tmp_path)
    first.unlink()
    assert locations(thin) == {"base.onnx": {"W"}}
    assert oa.open_model(thin).weights_in == (base,)
    assert thin.stat().st_size > 2 * 2 * 64 * 64 * 4
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()
    oa.save_model(oa.remove(oa.open_model(thin)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == base.read_bytes()


def test_an_adapted_model_can_be_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    adapted = oa.save_model(slotted(base, bottleneck=64), tmp_path / "adapted.onnx").path
    thin, full = thin_and_full(slotted(adapted, seed=1), tmp_path)
    slot = oa.list_slots(oa.open_model(base.with_name("adapted.onnx")))[0]
    parts = {slot.weight(part) for part in slot.parts}
    assert locations(thin) == {"adapted.onnx": {"W", *parts}}
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()


def test_a_thin_model_is_written_beside_its_base_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.onnx", dense())
    (tmp_path / "other").mkdir()
    done = refused(
        "insert", "base.onnx", "--after", "dense", "--thin", "-o", "other/thin.onnx"
    )
    assert done.error == "error: a thin model refers to base.onnx and must be beside it"
    assert f"-o {tmp_path}" in done.hint
    assert "--thin" in done.hint
    assert run("insert", "base.onnx", "--after", "dense", "--thin").status == 0
    thin = "base.adapted.onnx"
    refused("insert", thin, "--after", "dense", "--thin", "-o", "other/thin.onnx")


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_nothing_made_from_a_base_replaces_it(
    force: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.onnx", dense())
    (tmp_path / "link.onnx").symlink_to("base.onnx")
    run("insert", "base.onnx", "--after", "dense", "--thin", "-o", "thin.onnx")
    for target in ("base.onnx", "link.onnx"):
        for command in (
            ("insert", "base.onnx", "--after", "dense", "--thin"),
            ("insert", "thin.onnx", "--after", "dense", "--stack", "--thin"),
            ("insert", "thin.onnx", "--after", "dense", "--stack"),
            ("pack", "thin.onnx"),
            ("remove", "thin.onnx"),
        ):
            done = refused(*command, "-o", target, *force)
            assert "would replace 'base.onnx', which holds" in done.error
            assert "-o" in done.hint


def test_a_thin_model_can_be_made_again_in_its_place(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    oa.save_model(slotted(thin, seed=1), thin, thin=True, overwrite=True)
    full = oa.save_model(slotted(tmp_path / "full.onnx", seed=1), tmp_path / "two.onnx").path
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()
    packed = oa.save_model(oa.open_model(thin), thin, overwrite=True).path
    assert packed.read_bytes() == full.read_bytes()


def head_changed(data: bytes) -> bytes:
    """Another fine-tune of the same layout: one of its weights was trained on."""
    head = weight(64, 40, seed=3).tobytes()
    assert head in data
    return data.replace(head, weight(64, 40, seed=4).tobytes())


CHANGES = {
    "gone": (None, "thin.onnx needs the data file 'base.onnx', which is not in"),
    "longer": (lambda data: data + b"\0", "base.onnx has changed since thin.onnx was made"),
    "empty": (lambda data: b"", "'base.onnx', which has 0"),
    "moved": (lambda data: b"\0" + data[:-1], "base.onnx has changed since thin.onnx"),
    "other head": (head_changed, "base.onnx has changed since thin.onnx was made"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_is_gone_or_another_one_is_an_error_everywhere(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    edit, message = CHANGES[change]
    base = write(tmp_path / "base.onnx", dense(raw("V", 3)))
    write(tmp_path / "kept.onnx", base.read_bytes())
    thin_and_full(slotted(base), tmp_path)
    stamp = base.stat().st_mtime_ns
    base.unlink()
    if edit:
        write(base, edit((tmp_path / "kept.onnx").read_bytes()))
        os.utime(base, ns=(stamp, stamp))
    for command in (
        ("slots", "thin.onnx"),
        ("verify", "kept.onnx", "thin.onnx"),
        ("pack", "thin.onnx", "-o", "packed.onnx"),
        ("remove", "thin.onnx"),
        ("insert", "thin.onnx", "--after", "dense"),
    ):
        done = refused(*command)
        assert message in done.error
    checked = run("check", "thin.onnx")
    assert checked.status == 1
    assert "thin.onnx: 1 problem\n" in checked.out
    assert message in checked.out
    document = json.loads(run("check", "thin.onnx", "--json").out)
    assert not document["passed"]
    assert message in document["problems"]["thin.onnx"][0]


@pytest.mark.parametrize("change", CHANGES)
def test_a_session_does_not_run_on_a_base_that_is_gone_or_another_one(
    change: str, tmp_path: Path
) -> None:
    edit, _ = CHANGES[change]
    base = write(tmp_path / "base.onnx", dense(raw("V", 3)))
    model = slotted(base, baked=False, bottleneck=None)
    thin, full = thin_and_full(model, tmp_path)
    adapter = oa.extract(slotted(base), name="fr")
    before = [
        oa.AdapterSession(path, {"fr": adapter}).run({"x": X}, adapter="fr")["y"]
        for path in (thin, full)
    ]
    assert before[0].tobytes() == before[1].tobytes()
    data = base.read_bytes()
    base.unlink()
    if edit:
        write(base, edit(data))
    with pytest.raises((ExternalDataError, RunError), match=r"thin\.onnx") as caught:
        oa.AdapterSession(thin)
    assert caught.value.hint
    assert change == "empty" or "base.onnx" in str(caught.value)


def test_a_copy_of_the_base_is_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, full = thin_and_full(slotted(base), tmp_path)
    data = base.read_bytes()
    base.unlink()
    write(base, data)
    os.utime(base, ns=(1, 1))
    assert run("check", thin).status == 0
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()
    other = tmp_path / "other"
    for path in (base, thin):
        write(other / path.name, path.read_bytes())
    assert outputs(other / "thin.onnx")[0].tobytes() == outputs(full)[0].tobytes()
    assert oa.verify(other / "base.onnx", other / "thin.onnx").passed


def test_a_base_that_changes_between_opening_and_saving_is_noticed(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    model = slotted(base)
    os.utime(base, ns=(1, 1))
    with pytest.raises(SaveError, match=r"base\.onnx has changed since it was opened"):
        oa.save_model(model, tmp_path / "thin.onnx", thin=True)
    assert set(files(tmp_path)) == {"base.onnx"}


def test_a_model_in_memory_has_no_file_to_refer_to(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="a model in memory cannot be saved thin") as caught:
        oa.save_model(oa.Model(dense()), tmp_path / "thin.onnx", thin=True)
    assert "open it from its file" in caught.value.hint


def test_another_tool_may_put_the_weights_back_in(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, full = thin_and_full(slotted(base), tmp_path)
    onnx.save(onnx.load(thin), tmp_path / "whole.onnx")
    base.unlink()
    model = oa.open_model(tmp_path / "whole.onnx")
    assert model.weights_in == ()
    oa.save_model(model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == full.read_bytes()
    served = oa.AdapterSession(tmp_path / "whole.onnx").run({"x": X})["y"]
    assert served.tobytes() == outputs(full)[0].tobytes()


def test_a_thin_model_without_its_record_is_one_with_external_data(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    proto = onnx.load(thin, load_external_data=False)
    del proto.metadata_props[:]
    lost = oa.open_model(write(tmp_path / "lost.onnx", proto))
    assert lost.proto == proto
    assert lost.weights_in == ()


DAMAGED = [
    "{",
    "{}",
    "[1]",
    '"\\ud800"',
    "[" * 100_000,
    '{"format": 1, "files": [{}]}',
    '{"format": 1, "files": [{"name": 1, "size": 1, "ranges": [], "sha256": ""}]}',
    '{"format": 1, "files": [{"name": "b", "size": -1, "ranges": [], "sha256": ""}]}',
    '{"format": 1, "files": [{"name": "b", "size": 1, "ranges": [[1]], "sha256": ""}]}',
    f'{{"format":1,"files":[{{"name":"b","size":1,"ranges":[[{2**70},1]],"sha256":""}}]}}',
    *(
        json.dumps(
            {"format": 1, "files": [{"name": n, "size": 1, "ranges": [], "sha256": ""}]}
        )
        for n in ("../b", "a/../../b", "/dev/zero", "..\\b", "a\0b")
    ),
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_record_is_an_error_with_a_hint(text: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    proto = onnx.load(thin, load_external_data=False)
    proto.metadata_props[-1].value = text
    write(thin, proto)
    with pytest.raises(ManifestError, match="damaged") as caught:
        oa.open_model(thin)
    assert caught.value.hint


def test_a_session_does_not_wait_for_a_pipe_that_a_record_names(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    proto = onnx.load(thin, load_external_data=False)
    record = json.loads(proto.metadata_props[-1].value)
    record["files"].append(record["files"][0] | {"name": "pipe"})
    proto.metadata_props[-1].value = json.dumps(record)
    write(thin, proto)
    os.mkfifo(tmp_path / "pipe")
    code = (
        "import sys, onnx_adapt as oa\n"
        "try:\n    oa.AdapterSession(sys.argv[1])\nexcept oa.AdaptError:\n    print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(thin)],
        capture_output=True, text=True, timeout=LONG, check=True,
    )  # fmt: skip
    assert done.stdout == "refused\n"


def test_a_weight_that_is_borrowed_many_times_does_not_fill_the_disk(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    proto = onnx.load(thin, load_external_data=False)
    for i in range(1000):
        tensor = proto.graph.initializer.add()
        tensor.CopyFrom(proto.graph.initializer[0])
        tensor.name = f"w{i}"
    write(thin, proto)
    with pytest.raises(ExternalDataError, match="more bytes than the file"):
        oa.open_model(thin)


def test_a_record_of_a_later_format_is_not_read(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    proto = onnx.load(thin, load_external_data=False)
    record = json.loads(proto.metadata_props[-1].value)
    proto.metadata_props[-1].value = json.dumps({**record, "format": 2})
    write(thin, proto)
    with pytest.raises(ManifestError, match="format 2"):
        oa.open_model(thin)


def test_the_record_says_what_the_base_was(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, _ = thin_and_full(slotted(base), tmp_path)
    session = onnxruntime.InferenceSession(thin)
    record = json.loads(session.get_modelmeta().custom_metadata_map["onnx_adapt.files.thin"])
    (file,) = record["files"]
    assert file["name"] == "base.onnx"
    assert file["size"] == base.stat().st_size
    assert file["ranges"] == [[base.read_bytes().index(weight(64, 64).tobytes()), 16384]]


def test_thin_needs_no_room_in_protobuf_and_pack_takes_what_a_full_save_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write(tmp_path / "base.onnx", dense())
    monkeypatch.setattr(model_file, "PROTOBUF_LIMIT", 9000)
    thin = oa.save_model(slotted(base), tmp_path / "thin.onnx", thin=True)
    assert not thin.externalised
    assert thin.data == ()
    full = oa.save_model(slotted(base), tmp_path / "big.onnx")
    assert full.externalised
    (tmp_path / "other").mkdir()
    packed = oa.save_model(oa.open_model(thin.path), tmp_path / "other" / "big.onnx")
    assert packed.path.read_bytes() == full.path.read_bytes()
    assert packed.data[0].read_bytes() == full.data[0].read_bytes()
    from_moved, whole = thin_and_full(slotted(full.path, seed=2), tmp_path)
    assert locations(from_moved) == {"big.onnx.data": {"W"}}
    assert outputs(from_moved)[0].tobytes() == outputs(whole)[0].tobytes()
    monkeypatch.undo()
    back = oa.save_model(oa.remove(oa.open_model(from_moved)), tmp_path / "back.onnx")
    assert back.path.read_bytes() == base.read_bytes()


def embedding(path: Path, rows: int) -> Path:
    """A model that looks up rows of 1 kB in a weight that is a hole in the file."""
    nodes = [
        helper.make_node("Gather", ["E", "ids"], ["e"], name="embed"),
        helper.make_node("Identity", ["e"], ["y"], name="last"),
    ]
    ends = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 256]))
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    size = rows * 1024
    key = varint(9 << 3 | 2) + varint(size)
    head = TensorProto(name="E", data_type=1, dims=[rows, 256]).SerializeToString() + key
    head = graph.SerializeToString() + varint(5 << 3 | 2) + varint(len(head) + size) + head
    tail = helper.make_model(onnx.GraphProto(), opset_imports=[helper.make_opsetid("", 17)])
    tail.ClearField("graph")
    with path.open("wb") as file:
        file.write(b"\x08\x08" + varint(7 << 3 | 2) + varint(len(head) + size) + head)
        file.seek(size, os.SEEK_CUR)
        tail.ClearField("ir_version")
        file.write(tail.SerializeToString())
    return path


def test_a_base_that_protobuf_cannot_read_runs_thin(tmp_path: Path) -> None:
    base = embedding(tmp_path / "base.onnx", rows=2_200_000)
    assert base.stat().st_size > 2**31
    with base.open("r+b") as file:
        file.seek(oa.open_model(base).payloads[0].offset + 2_199_999 * 1024)
        file.write(weight(256).tobytes())
    model = oa.insert(oa.open_model(base), after="last", baked=True, bottleneck=2)
    thin = oa.save_model(model, tmp_path / "thin.onnx", thin=True)
    assert thin.size < 10_000
    onnx.checker.check_model(str(thin.path))
    (y,) = outputs(thin.path, ids=np.array([5, 2_199_999]))
    np.testing.assert_array_equal(y, [np.zeros(256), weight(256)])


def test_the_command_says_how_small_the_result_is_and_what_it_needs(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    done = run("insert", base, "--after", "dense", "--thin")
    thin = tmp_path / "base.adapted.onnx"
    assert done.status == 0
    assert f"wrote {thin} ({thin.stat().st_size / 1000:.1f} kB)" in done.err
    size = f"{base.stat().st_size / 1000:.1f} kB"
    assert f"its weights stay in base.onnx ({size}): keep the two together" in done.err
    assert "verified against base.onnx" in done.err
    document = json.loads(
        run("insert", base, "--after", "dense", "--thin", "--json", "--force").out
    )
    assert document["weights_in"] == [str(base)]
    document = json.loads(run("insert", base, "--after", "dense", "--json", "--force").out)
    assert document["weights_in"] == []


def test_the_command_says_when_there_is_nothing_to_leave_in_the_base(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense(width=8))
    done = run("insert", base, "--after", "dense", "--thin", "-o", tmp_path / "thin.onnx")
    assert done.status == 0
    assert "no weight is large enough to stay in base.onnx" in done.err
    whole = run("insert", base, "--after", "dense", "-o", tmp_path / "full.onnx")
    assert whole.status == 0
    assert (tmp_path / "thin.onnx").read_bytes() == (tmp_path / "full.onnx").read_bytes()


def test_a_thin_model_is_filled_and_stays_thin(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    oa.save_model(slotted(base, baked=False), tmp_path / "thin.onnx", thin=True)
    oa.save_adapter(oa.extract(slotted(base), name="fr"), tmp_path / "fr.safetensors")
    command = ("fill", tmp_path / "thin.onnx", tmp_path / "fr.safetensors", "--baked")
    done = run(*command, "--thin", "-o", tmp_path / "fr.onnx")
    assert "its weights stay in base.onnx" in done.err
    run(*command, "-o", tmp_path / "full.onnx")
    (tmp_path / "thin.onnx").unlink()
    assert locations(tmp_path / "fr.onnx") == {"base.onnx": {"W"}}
    ours, theirs = (outputs(tmp_path / name) for name in ("fr.onnx", "full.onnx"))
    assert ours[0].tobytes() == theirs[0].tobytes()


def test_a_model_that_is_not_thin_is_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.onnx", dense())
    done = refused("pack", "base.onnx", "-o", "packed.onnx")
    assert "base.onnx is not thin" in done.error


def test_pack_tells_what_it_wrote(tmp_path: Path) -> None:
    base = write(tmp_path / "base.onnx", dense())
    thin, full = thin_and_full(slotted(base), tmp_path)
    done = run("pack", thin, "--json")
    packed = tmp_path / "thin.packed.onnx"
    assert f"wrote {packed} ({packed.stat().st_size / 1000:.1f} kB)" in done.err
    document = json.loads(done.out)
    assert document["output"] == str(packed)
    assert document["size"] == full.stat().st_size


def test_a_trained_checkpoint_goes_in_thin(tmp_path: Path) -> None:
    case = Path(__file__).parent.parent / "cases" / "peft_bert_lora_default_ts"
    base = write(tmp_path / "base.onnx", (case / "base.onnx").read_bytes())
    done = run(
        *("insert", base, "--adapter", case / "adapter", "--baked", "--thin"),
        *("-o", tmp_path / "thin.onnx"),
    )
    assert done.status == 0, done.err
    with np.load(case / "inputs.npz") as inputs, np.load(case / "expected.npz") as expected:
        got = outputs(tmp_path / "thin.onnx", **inputs)[0]
        np.testing.assert_allclose(got, next(iter(expected.values())), atol=1e-4)


def test_a_name_that_a_reference_cannot_hold_is_an_error_with_a_hint(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/b\xff.onnx"
    Path(os.fsdecode(name)).write_bytes(dense().SerializeToString())
    done = process("plain", "insert", name, "--after", "dense", "--thin", "--no-verify")
    assert "not UTF-8" in done.error
    assert "rename" in done.hint
    odd = write(tmp_path / "ein Modell \N{SNOWMAN}.onnx", dense())
    thin, full = thin_and_full(slotted(odd), tmp_path)
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()


def test_a_thin_model_in_a_download_cache_can_be_used(tmp_path: Path) -> None:
    write(tmp_path / "blobs" / "aaa", dense())
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "m.onnx").symlink_to("../blobs/aaa")
    model = slotted(tmp_path / "main" / "m.onnx")
    thin, full = thin_and_full(model, tmp_path / "main")
    assert outputs(thin)[0].tobytes() == outputs(full)[0].tobytes()
    oa.save_model(oa.open_model(thin), tmp_path / "packed.onnx")
    assert (tmp_path / "packed.onnx").read_bytes() == full.read_bytes()


@pytest.mark.parametrize("large", [1, 64], ids=["not empty", "64 bytes"])
def test_every_model_is_whole_again_after_it_was_thin(
    large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payloads, "LARGE", large)
    base, different, borrowed = tmp_path / "base.onnx", [], 0
    for path in CORPUS:
        write(base, path.read_bytes())
        thin = oa.save_model(oa.open_model(base), tmp_path / "thin.onnx", thin=True)
        borrowed += bool(thin.weights_in)
        oa.save_model(oa.open_model(thin.path), tmp_path / "back.onnx")
        if (tmp_path / "back.onnx").read_bytes() != path.read_bytes():
            different.append(path.name)
    assert borrowed >= 50
    assert different == []
