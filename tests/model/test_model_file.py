"""Opening and saving: lossless for every model, and large tensors stay on disk."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from disk_models import (
    chunk,
    dense,
    files,
    raw,
    typed,
    weight,
    with_data_everywhere,
    write,
)
from onnx import TensorProto, numpy_helper

import onnx_adapt as oa
from onnx_adapt.errors import ModelFileError, SaveError
from onnx_adapt.model import payloads
from onnx_adapt.model.file import Model
from onnx_adapt.model.tensors import read_tensor

TESTS = Path(__file__).parent.parent
CORPUS = [
    *sorted((Path(onnx.__file__).parent / "backend/test/data").rglob("*.onnx")),
    *sorted((TESTS.parent / "models").glob("*.onnx")),
    *sorted((TESTS / "exports").glob("*.onnx")),
]


def tensors_of(message: object) -> list[TensorProto]:
    """Every tensor inside a message, found by walking all fields protobuf knows."""
    if isinstance(message, TensorProto):
        return [message]
    found = []
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            for item in value if descriptor.is_repeated else [value]:
                found += tensors_of(item)
    return found


@pytest.mark.parametrize("large", [0, 1, 4096], ids=["all", "not empty", "4 kB"])
def test_every_model_comes_back_byte_for_byte(
    large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payloads, "LARGE", large)
    copy, different = tmp_path / "copy.onnx", []
    for path in CORPUS:
        model = oa.open_model(path)
        oa.save_model(model, copy)
        if not model.canonical or copy.read_bytes() != path.read_bytes():
            different.append(path.name)
    assert len(CORPUS) >= 150
    assert different == []


def test_large_tensors_stay_on_disk_wherever_they_are(tmp_path: Path) -> None:
    whole = with_data_everywhere()
    path = write(tmp_path / "m.onnx", whole)
    model = oa.open_model(path)
    assert model.canonical
    assert model.proto.ByteSize() < 10_000
    assert whole.ByteSize() > 250_000
    ours, theirs = tensors_of(model.proto), tensors_of(whole)
    assert len(model.payloads) == len(theirs) == 27
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.name == its.name
        value = read_tensor(model, mine)
        assert value.dtype == numpy_helper.to_array(its).dtype
        np.testing.assert_array_equal(value, numpy_helper.to_array(its))
    oa.save_model(model, tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()


def test_what_the_data_is_stored_in_survives(tmp_path: Path) -> None:
    default = TensorProto(
        name="D", data_type=1, dims=[2000], raw_data=weight(2000).tobytes(), data_location=0
    )
    model = dense(typed("F", 1, TensorProto.FLOAT), typed("G", 2, TensorProto.DOUBLE), default)
    path = write(tmp_path / "m.onnx", model)
    oa.save_model(oa.insert(oa.open_model(path), after="dense"), tmp_path / "ad.onnx")
    kept = {t.name: t for t in onnx.load(tmp_path / "ad.onnx").graph.initializer}
    assert len(kept["F"].float_data) == len(kept["G"].double_data) == 2560
    assert kept["D"].HasField("data_location")
    assert not kept["W"].HasField("data_location")
    oa.save_model(oa.remove(oa.open_model(tmp_path / "ad.onnx")), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("field", ["float_data", "double_data"])
@pytest.mark.parametrize("beside", [b"", b"\0" * 8], ids=["empty", "short"])
def test_typed_data_beside_raw_data_is_not_lost(
    field: str, beside: bytes, tmp_path: Path
) -> None:
    kind = {"float_data": TensorProto.FLOAT, "double_data": TensorProto.DOUBLE}[field]
    both = typed("V", 0, kind)
    both.raw_data = beside
    path = write(tmp_path / "m.onnx", dense(both))
    oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx").graph.initializer[1] == both


def test_fields_of_a_later_onnx_survive_insert_and_remove(tmp_path: Path) -> None:
    new = chunk(300, b"a later field")
    model = dense()
    for message in (
        model.graph.node[0],
        model.graph.initializer[0],
        model.graph.input[0],
        model.graph,
        model,
    ):
        message.MergeFromString(new)
    path = write(tmp_path / "m.onnx", model)
    assert path.read_bytes().count(new) == 5
    base = oa.open_model(path)
    assert base.canonical
    adapted = oa.save_model(oa.insert(base, after="dense"), tmp_path / "ad.onnx").path
    assert adapted.read_bytes().count(new) == 5
    oa.save_model(oa.remove(oa.open_model(adapted)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_a_model_without_ir_version_comes_back_byte_for_byte(tmp_path: Path) -> None:
    model = dense()
    model.ClearField("ir_version")
    path = write(tmp_path / "m.onnx", model)
    oa.save_model(oa.insert(oa.open_model(path), after="dense"), tmp_path / "ad.onnx")
    oa.save_model(oa.remove(oa.open_model(tmp_path / "ad.onnx")), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("gone", ["node", "output"])
def test_a_graph_of_outputs_or_of_nodes_alone_is_a_graph(gone: str, tmp_path: Path) -> None:
    model = dense()
    model.graph.ClearField(gone)
    path = write(tmp_path / "m.onnx", model)
    oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()


def test_only_from_ir_3_on_is_a_model_without_opsets_cut_off(tmp_path: Path) -> None:
    model = dense()
    model.ClearField("opset_import")
    model.ir_version = 2
    path = write(tmp_path / "m.onnx", model)
    oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()
    model.ir_version = 3
    with pytest.raises(ModelFileError, match="ends before its opset") as caught:
        oa.open_model(write(path, model))
    assert "cut off" in caught.value.hint


def test_saving_works_where_the_system_cannot_copy_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    path = write(tmp_path / "m.onnx", dense(raw("V", 3), width=600))
    assert path.stat().st_size > 1 << 20
    oa.save_model(oa.open_model(path), tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == path.read_bytes()


def test_a_save_leaves_the_input_and_the_model_as_they_were(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", with_data_everywhere())
    model = oa.open_model(path)
    before, proto = files(tmp_path), model.proto.SerializeToString()
    told: list[tuple[int, int]] = []
    saved = oa.save_model(
        model, tmp_path / "copy.onnx", progress=lambda *now: told.append(now)
    )
    after = files(tmp_path)
    assert after.pop("copy.onnx")
    assert after == before
    assert model.proto.SerializeToString() == proto
    assert saved.size == path.stat().st_size
    assert told == sorted(told)
    assert told[-1] == (saved.size, saved.size)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_interrupted_save_leaves_nothing_behind(
    failure: type[BaseException], tmp_path: Path
) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense()))
    (tmp_path / "old.onnx").write_bytes(b"an older result")
    before = files(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise failure

    for name in ("new.onnx", "old.onnx"):
        with pytest.raises((failure, SaveError)):
            oa.save_model(model, tmp_path / name, progress=stop)
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", ["longer", "shorter", "touched", "gone"])
def test_a_model_that_changed_since_it_was_opened_is_not_saved(
    change: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", dense())
    model, data = oa.open_model(path), path.read_bytes()
    path.unlink()
    if change != "gone":
        path.write_bytes({"longer": data + b"\0", "shorter": data[:-1]}.get(change, data))
        os.utime(path, ns=(1, 1))
    before = files(tmp_path)
    with pytest.raises(SaveError, match="has changed since it was opened") as caught:
        oa.save_model(model, tmp_path / "copy.onnx")
    assert caught.value.hint == "run again"
    assert files(tmp_path) == before


@pytest.mark.parametrize("change", ["shorter", "other data"])
def test_a_model_that_changes_while_it_is_saved_gives_no_result(
    change: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.onnx", dense(raw("V", 1)))
    model, size = oa.open_model(path), path.stat().st_size

    def change_it(done: int, total: int) -> None:
        if done < 5000:
            path.write_bytes(b"\x01" * (5000 if change == "shorter" else size))

    with pytest.raises(SaveError):
        oa.save_model(model, tmp_path / "copy.onnx", progress=change_it)
    assert set(files(tmp_path)) == {"m.onnx"}


def test_saving_over_the_input_is_allowed_on_request_and_can_be_undone(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", dense())
    base = path.read_bytes()
    with pytest.raises(SaveError, match="replace the input") as caught:
        oa.save_model(oa.insert(oa.open_model(path), after="dense"), path)
    assert "--force" in caught.value.hint
    assert path.read_bytes() == base
    oa.save_model(oa.insert(oa.open_model(path), after="dense"), path, overwrite=True)
    assert len(oa.list_slots(oa.open_model(path))) == 1
    oa.save_model(oa.remove(oa.open_model(path)), path, overwrite=True)
    assert path.read_bytes() == base
    assert set(files(tmp_path)) == {"m.onnx"}


def test_a_replaced_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense()))
    old = write(tmp_path / "real" / "old.onnx", b"older")
    old.chmod(0o600)
    (tmp_path / "link.onnx").symlink_to(old)
    oa.save_model(model, tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").readlink() == old
    assert old.read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert old.stat().st_mode & 0o777 == 0o600


def test_a_model_made_in_memory_can_be_saved(tmp_path: Path) -> None:
    model = Model(with_data_everywhere())
    saved = oa.save_model(model, tmp_path / "m.onnx")
    assert model.weights_in == saved.weights_in == saved.data == ()
    assert saved.size == (tmp_path / "m.onnx").stat().st_size
    assert onnx.load(tmp_path / "m.onnx") == with_data_everywhere()


def test_reading_a_tensor_whose_file_is_gone_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", dense())
    model = oa.open_model(path)
    path.unlink()
    with pytest.raises(ModelFileError, match=r"m\.onnx: No such file"):
        read_tensor(model, model.proto.graph.initializer[0])


def test_a_tensor_whose_data_does_not_fit_its_shape_is_damaged(tmp_path: Path) -> None:
    whole = dense()
    whole.graph.initializer[0].dims[:] = [64, 65]
    model = oa.open_model(write(tmp_path / "m.onnx", whole))
    with pytest.raises(ModelFileError, match="'W' is damaged"):
        read_tensor(model, model.proto.graph.initializer[0])


@pytest.mark.parametrize("data_type", [TensorProto.UNDEFINED, 99, -1])
def test_a_tensor_of_no_known_type_is_damaged(data_type: int, tmp_path: Path) -> None:
    whole = dense()
    whole.graph.initializer[0].data_type = data_type
    model = oa.open_model(write(tmp_path / "m.onnx", whole))
    with pytest.raises(ModelFileError, match="'W' is damaged") as caught:
        read_tensor(model, model.proto.graph.initializer[0])
    assert "export" in caught.value.hint
