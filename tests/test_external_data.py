"""Data in files beside a model: kept, copied, refused, and moved out of large models."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from disk_models import (
    chunk,
    dense,
    external,
    files,
    raw,
    refer,
    run,
    sparse,
    typed,
    weight,
    write,
)
from onnx import TensorProto, helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt import model_file
from onnx_adapt.errors import AdaptError, ExternalDataError, SaveError
from onnx_adapt.model_file import read_tensor

X = weight(2, 64, seed=9)


def output(path: Path) -> np.ndarray:
    """What ONNX Runtime says; bad references stop it."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": X})[0]


def adapted(path: Path) -> oa.Model:
    return oa.insert(oa.open_model(path), after="dense", baked=True, bottleneck=2)


def limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the models of these tests pass the limit of protobuf, 2 GB."""
    monkeypatch.setattr(model_file, "PROTOBUF_LIMIT", size)


def cached(folder: Path) -> Path:
    """A model in a download cache: it and its data are links into a folder of blobs."""
    external(folder / "blobs" / "aaa", "w.bin").parent.joinpath("w.bin").rename(
        folder / "blobs" / "bbb"
    )
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "m.onnx").symlink_to("../../blobs/aaa")
    (snapshot / "w.bin").symlink_to("../../blobs/bbb")
    return snapshot / "m.onnx"


def test_in_the_same_folder_the_references_stay_and_the_data_is_not_touched(
    tmp_path: Path,
) -> None:
    path = external(tmp_path / "m.onnx", "sub/w.bin")
    before = files(tmp_path)
    saved = oa.save_model(adapted(path), tmp_path / "ad.onnx")
    after = files(tmp_path)
    assert after.pop("ad.onnx")
    assert after == before
    assert saved.data == ()
    kept = onnx.load(tmp_path / "ad.onnx", load_external_data=False).graph.initializer[0]
    assert kept == onnx.load(path, load_external_data=False).graph.initializer[0]
    np.testing.assert_array_equal(output(tmp_path / "ad.onnx"), output(path))


def test_in_another_folder_the_data_comes_along(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "sub/w.bin")
    (tmp_path / "other").mkdir()
    saved = oa.save_model(adapted(path), tmp_path / "other" / "ad.onnx")
    assert set(files(tmp_path / "other")) == {"ad.onnx", "sub", "sub/w.bin"}
    assert saved.data == (tmp_path / "other" / "sub" / "w.bin",)
    assert saved.data[0].read_bytes() == (tmp_path / "sub" / "w.bin").read_bytes()
    np.testing.assert_array_equal(output(saved.path), output(path))
    done = run("insert", path, "--after", "dense", "-o", tmp_path / "third.onnx")
    assert "copied" not in done.err
    (tmp_path / "last").mkdir()
    done = run("insert", path, "--after", "dense", "-o", tmp_path / "last" / "ad.onnx")
    assert "copied the data beside it: w.bin" in done.err


def test_a_model_in_memory_has_no_folder_for_its_data(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx", "w.bin")
    model = oa.Model(onnx.load(tmp_path / "m.onnx", load_external_data=False))
    with pytest.raises(ExternalDataError, match="'W' is external to a model in memory"):
        oa.save_model(model, tmp_path / "copy.onnx")
    with pytest.raises(ExternalDataError, match="'W' is external to a model in memory"):
        read_tensor(model, model.proto.graph.initializer[0])


def test_data_that_is_there_already_is_used_as_it_is(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    write(tmp_path / "other" / "w.bin", (tmp_path / "w.bin").read_bytes())
    before = files(tmp_path / "other")
    saved = oa.save_model(oa.open_model(path), tmp_path / "other" / "m.onnx")
    assert saved.data == ()
    assert files(tmp_path / "other")["w.bin"] == before["w.bin"]


def test_other_data_at_the_destination_is_not_overwritten(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    write(tmp_path / "other" / "w.bin", b"precious")
    before = files(tmp_path)
    with pytest.raises(SaveError, match=r"w\.bin exists and is not the data of m\.onnx") as e:
        oa.save_model(oa.open_model(path), tmp_path / "other" / "m.onnx")
    assert "rename the data file that is there" in e.value.hint
    assert files(tmp_path) == before


def test_keep_external_copies_nothing_and_needs_the_data_to_be_there(tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    other = tmp_path / "other"
    other.mkdir()
    refused = run(
        "insert", path, "--after", "dense", "-o", other / "m.onnx", "--keep-external"
    )
    assert "m.onnx needs the data file 'w.bin', which is not in" in refused.error
    assert "copy the data file" in refused.hint
    write(other / "w.bin", b"too short")
    with pytest.raises(ExternalDataError, match="which has 9"):
        oa.save_model(oa.open_model(path), other / "m.onnx", keep_external=True)
    assert set(files(other)) == {"w.bin"}
    write(other / "w.bin", (tmp_path / "w.bin").read_bytes())
    before = files(other)
    oa.save_model(oa.open_model(path), other / "m.onnx", keep_external=True)
    assert files(other)["w.bin"] == before["w.bin"]
    np.testing.assert_array_equal(output(other / "m.onnx"), output(path))


@pytest.mark.parametrize("target", ["w.bin", "other/w.bin"])
def test_the_model_may_not_take_the_name_of_its_data(target: str, tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    (tmp_path / "other").mkdir()
    before = files(tmp_path)
    with pytest.raises(SaveError, match="would replace") as caught:
        oa.save_model(oa.open_model(path), tmp_path / target, overwrite=True)
    assert "-o" in caught.value.hint
    assert files(tmp_path) == before


OUTSIDE = [
    "../w.bin",
    "/w.bin",
    "sub/../../w.bin",
    "C:\\w.bin",
    "\\\\host\\w.bin",
    "..\\w.bin",
]


@pytest.mark.parametrize("location", OUTSIDE)
def test_a_path_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    model = dense()
    refer(model.graph.initializer[0], location=location)
    write(tmp_path / "w.bin", bytes(20_000))
    path = write(tmp_path / "sub" / "m.onnx", model)
    with pytest.raises(ExternalDataError, match=r"'W' refers to .*outside the model's folder"):
        oa.open_model(path)
    assert "move the data there" in run("sites", path).hint


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_that_leaves_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    path = external(tmp_path / "sub" / "m.onnx", "data/w.bin")
    data = tmp_path / "sub" / "data"
    if kind == "file":
        (data / "w.bin").rename(tmp_path / "w.bin")
        (data / "w.bin").symlink_to(tmp_path / "w.bin")
    else:
        data.rename(tmp_path / "data")
        data.symlink_to(tmp_path / "data")
    with pytest.raises(ExternalDataError, match="outside the model's folder"):
        oa.open_model(path)


def test_a_link_within_the_folder_and_a_link_to_the_folder_are_fine(tmp_path: Path) -> None:
    path = external(tmp_path / "real" / "m.onnx", "w.bin")
    (tmp_path / "real" / "w.bin").rename(tmp_path / "real" / "blob")
    (tmp_path / "real" / "w.bin").symlink_to("blob")
    (tmp_path / "link").symlink_to("real")
    for folder in ("real", "link"):
        oa.save_model(adapted(tmp_path / folder / "m.onnx"), tmp_path / folder / "ad.onnx")
        np.testing.assert_array_equal(output(tmp_path / "real" / "ad.onnx"), output(path))
    assert set(files(tmp_path / "real")) == {"m.onnx", "w.bin", "blob", "ad.onnx"}


def test_a_model_in_a_download_cache_opens_and_is_copied_whole(tmp_path: Path) -> None:
    path = cached(tmp_path)
    (tmp_path / "out").mkdir()
    oa.save_model(adapted(path), tmp_path / "out" / "ad.onnx")
    assert not (tmp_path / "out" / "w.bin").is_symlink()
    np.testing.assert_allclose(output(tmp_path / "out" / "ad.onnx"), X @ weight(64, 64), 1e-4)


def test_a_model_in_a_download_cache_is_verified_on_insertion(tmp_path: Path) -> None:
    done = run("insert", cached(tmp_path), "--after", "dense", "-o", tmp_path / "ad.onnx")
    assert done.status == 0
    assert "not verified" not in done.err
    assert "verified against m.onnx" in done.err


@pytest.mark.parametrize("folder", ["snapshots/main", "blobs"])
def test_a_result_inside_a_download_cache_can_be_used(folder: str, tmp_path: Path) -> None:
    saved = oa.save_model(adapted(cached(tmp_path)), tmp_path / folder / "ad.onnx")
    opened = oa.open_model(saved.path)
    value = read_tensor(opened, opened.proto.graph.initializer[0])
    np.testing.assert_array_equal(value, weight(64, 64))
    np.testing.assert_allclose(output(saved.path), X @ weight(64, 64), 1e-4)


@pytest.mark.parametrize(
    ("entries", "size", "message"),
    [
        ({"length": "16384"}, 16383, "needs bytes 0 to 16384 of 'w.bin', which has 16383"),
        ({"offset": "4", "length": "16384"}, 16384, "needs bytes 4 to 16388"),
        ({"offset": "99999", "length": "0"}, 16384, "'w.bin', which has 16384"),
        ({}, 16383, "'w.bin', which has 16383"),
        ({"offset": "8"}, 16384, "'w.bin', which has 16384"),
        ({"length": "16"}, 16384, "'W'"),
        ({"length": "many"}, 16384, "broken offset or length"),
        ({"offset": "-8", "length": "16384"}, 16400, "'W'"),
    ],
    ids=["cut", "shifted", "beyond", "rest too short", "shifted rest", "too few", "nan", "-"],
)
def test_data_that_is_too_short_is_an_error_with_a_hint(
    entries: dict[str, str], size: int, message: str, tmp_path: Path
) -> None:
    model = dense()
    refer(model.graph.initializer[0], location="w.bin", **entries)
    path = write(tmp_path / "m.onnx", model)
    write(tmp_path / "w.bin", bytes(size))
    with pytest.raises(ExternalDataError, match=message) as caught:
        oa.open_model(path)
    assert caught.value.hint


def test_data_without_a_length_reaches_to_the_end_of_the_file(tmp_path: Path) -> None:
    model = dense()
    data = refer(model.graph.initializer[0], location="w.bin", offset="12", checksum="abc")
    path = write(tmp_path / "m.onnx", model)
    write(tmp_path / "w.bin", bytes(12) + data)
    opened = oa.open_model(path)
    value = read_tensor(opened, opened.proto.graph.initializer[0])
    np.testing.assert_array_equal(value, weight(64, 64))
    oa.save_model(oa.remove(adapted(path)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "location",
    [b"", b".", b"a\0b", b"\xff\xfe", b"loop", b"x" * 300, b"w.bin/x", b"missing"],
    ids=["empty", "folder", "NUL", "not UTF-8", "loop", "long", "inside a file", "missing"],
)
def test_a_location_that_cannot_be_a_file_is_an_error_with_a_hint(
    location: bytes, tmp_path: Path
) -> None:
    model = dense()
    refer(model.graph.initializer[0], location="?" * len(location))
    path = write(
        tmp_path / "m.onnx", model.SerializeToString().replace(b"?" * len(location), location)
    )
    write(tmp_path / "w.bin", bytes(16384))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ExternalDataError, match=r"'W'|needs the data file") as caught:
        oa.open_model(path)
    assert caught.value.hint


@pytest.mark.parametrize("target", ["other/m.onnx", "m.onnx"])
def test_data_that_vanishes_before_the_save_is_our_error(target: str, tmp_path: Path) -> None:
    path = external(tmp_path / "m.onnx", "w.bin")
    (tmp_path / "other").mkdir()
    model = oa.open_model(path)
    (tmp_path / "w.bin").unlink()
    before = files(tmp_path)
    with pytest.raises(AdaptError, match=r"w\.bin"):
        oa.save_model(model, tmp_path / target, overwrite=True)
    with pytest.raises(AdaptError, match=r"w\.bin"):
        read_tensor(model, model.proto.graph.initializer[0])
    assert files(tmp_path) == before


def test_data_moves_out_only_past_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense()))
    size = (tmp_path / "m.onnx").stat().st_size
    limit(monkeypatch, size)
    assert not oa.save_model(model, tmp_path / "in.onnx").moved_out
    limit(monkeypatch, size - 1)
    saved = oa.save_model(model, tmp_path / "out.onnx")
    assert saved.moved_out
    assert saved.data == (tmp_path / "out.onnx.data",)
    assert saved.size == (tmp_path / "out.onnx").stat().st_size < 1000
    assert set(files(tmp_path)) == {"m.onnx", "in.onnx", "out.onnx", "out.onnx.data"}


def awkward() -> onnx.ModelProto:
    """Tensors whose headers are not the usual ones."""
    data = weight(1111).tobytes()
    odd = [TensorProto(name=n, data_type=1, dims=[1111], raw_data=data) for n in "DML"]
    odd[0].data_location = TensorProto.DEFAULT
    odd[1].metadata_props.add(key="who", value="me")
    odd[1].doc_string = "doc"
    odd[2].external_data.add(key="location", value="left over")
    return dense(*odd)


@pytest.mark.parametrize("missing", [(), (3,), (1, 2, 3)], ids=["all", "no left over", "one"])
def test_what_moved_out_comes_back_byte_for_byte(
    missing: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = awkward()
    for index in reversed(missing):
        del base.graph.initializer[index]
    path = write(tmp_path / "m.onnx", base)
    with monkeypatch.context() as patch:
        limit(patch, 9000)
        saved = oa.save_model(adapted(path), tmp_path / "ad.onnx")
    assert saved.moved_out
    ours = [t for t in onnx.load(saved.path).graph.initializer if t.name in "WDML"]
    for mine, its in itertools.zip_longest(ours, base.graph.initializer):
        np.testing.assert_array_equal(numpy_helper.to_array(mine), numpy_helper.to_array(its))
    np.testing.assert_array_equal(output(saved.path), output(path))
    back = oa.save_model(oa.remove(oa.open_model(saved.path)), tmp_path / "back.onnx")
    assert back.data == ()
    assert back.path.read_bytes() == path.read_bytes()


def test_moved_out_data_follows_through_partial_removal_and_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.onnx", dense(raw("V", 4)))
    (tmp_path / "other").mkdir()
    with monkeypatch.context() as patch:
        limit(patch, 9000)
        first = oa.save_model(adapted(path), tmp_path / "one.onnx").path
        second = oa.save_model(adapted(first), tmp_path / "two.onnx").path
        less = oa.remove(
            oa.open_model(second), slots=[oa.list_slots(oa.open_model(first))[0].name]
        )
        moved = oa.save_model(less, tmp_path / "other" / "less.onnx").path
    np.testing.assert_array_equal(output(moved), output(path))
    oa.save_model(oa.remove(oa.open_model(moved)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_the_command_says_that_data_moved_out_and_brings_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.onnx", dense())
    with monkeypatch.context() as patch:
        limit(patch, 9000)
        inserted = run("insert", path, "--after", "dense")
    assert inserted.status == 0
    assert "would pass protobuf's 2 GB" in inserted.err
    assert "m.adapted.onnx.data, which belongs beside it" in inserted.err
    assert run("verify", path, tmp_path / "m.adapted.onnx").status == 0
    removed = run("remove", tmp_path / "m.adapted.onnx")
    assert removed.status == 0
    assert "the base is back, byte for byte" in removed.err
    assert (tmp_path / "m.adapted.removed.onnx").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "old",
    [None, b"no model", chunk(7, chunk(1, b"\xff")), dense().SerializeToString()],
    ids=["new", "no protobuf", "a broken node", "a model"],
)
def test_moved_out_data_does_not_overwrite_a_file_that_is_there(
    old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.onnx", dense())
    write(tmp_path / "ad.onnx.data", b"precious")
    if old is not None:
        write(tmp_path / "ad.onnx", old)
    before = files(tmp_path)
    limit(monkeypatch, 9000)
    with pytest.raises(SaveError, match=r"ad\.onnx\.data") as caught:
        oa.save_model(adapted(path), tmp_path / "ad.onnx")
    assert caught.value.hint
    assert files(tmp_path) == before


def test_a_result_that_holds_both_names_for_its_data_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense(raw("V", 4))))
    limit(monkeypatch, 9000)
    file = oa.save_model(model, tmp_path / "big.onnx").path
    proto = onnx.load(file, load_external_data=False)
    proto.graph.initializer[1].external_data[0].value = "big.onnx.1.data"
    write(file, proto)
    write(tmp_path / "big.onnx.1.data", (tmp_path / "big.onnx.data").read_bytes())
    before = files(tmp_path)
    with pytest.raises(SaveError, match=r"big\.onnx for its data exists") as caught:
        oa.save_model(model, file)
    assert "another path" in caught.value.hint
    assert files(tmp_path) == before


def test_data_that_was_lost_is_written_again_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense()))
    limit(monkeypatch, 9000)
    (data,) = oa.save_model(model, tmp_path / "big.onnx").data
    data.unlink()
    assert oa.save_model(model, tmp_path / "big.onnx").data == (data,)
    np.testing.assert_array_equal(output(tmp_path / "big.onnx"), output(tmp_path / "m.onnx"))


def test_a_graph_that_is_too_large_without_its_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.onnx", dense())
    before = files(tmp_path)
    limit(monkeypatch, 200)
    with pytest.raises(SaveError, match="even without the weights") as caught:
        oa.save_model(adapted(path), tmp_path / "ad.onnx")
    assert "fewer slots" in caught.value.hint
    assert files(tmp_path) == before


@pytest.mark.parametrize("target", ["big.onnx", "other/big.onnx"])
def test_moved_out_data_does_not_overwrite_the_data_the_model_has(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = external(tmp_path / "m.onnx", "big.onnx.data", raw("V", 4))
    (tmp_path / "other").mkdir()
    before = files(tmp_path)
    limit(monkeypatch, 9000)
    with pytest.raises(SaveError, match=r"big\.onnx\.data"):
        oa.save_model(adapted(path), tmp_path / target)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "kind", [TensorProto.FLOAT, TensorProto.DOUBLE], ids=["float", "double"]
)
def test_typed_data_moves_out_as_well(
    kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "m.onnx", dense(typed("V", 5, kind)))
    with monkeypatch.context() as patch:
        limit(patch, 9000)
        saved = oa.save_model(adapted(path), tmp_path / "ad.onnx")
    assert saved.moved_out
    before, after = (onnx.load(p).graph.initializer[1] for p in (path, saved.path))
    np.testing.assert_array_equal(numpy_helper.to_array(after), numpy_helper.to_array(before))
    oa.save_model(oa.remove(oa.open_model(saved.path)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_sparse_tensors_do_not_move_out_because_nobody_could_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense()
    base.graph.node.add(op_type="Identity", input=["S"], output=["s"])
    base.graph.output.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [9000]))
    base.graph.sparse_initializer.append(sparse("S", 5))
    path = write(tmp_path / "m.onnx", base)
    with monkeypatch.context() as patch:
        limit(patch, 40_000)
        saved = oa.save_model(adapted(path), tmp_path / "ad.onnx")
    assert saved.moved_out
    onnx.checker.check_model(str(saved.path))
    oa.save_model(oa.remove(oa.open_model(saved.path)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
