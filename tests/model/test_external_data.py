"""Data in files beside a model: kept, copied and refused."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from disk_models import (
    X,
    adapted,
    dense,
    external,
    files,
    output,
    refer,
    run,
    weight,
    write,
)

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, ExternalDataError, SaveError
from onnx_adapt.model.tensors import read_tensor


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
