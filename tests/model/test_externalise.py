"""Data that moves out of a model past protobuf's 2 GB, and comes back."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from disk_models import (
    adapted,
    chunk,
    dense,
    external,
    files,
    output,
    raw,
    run,
    sparse,
    typed,
    weight,
    write,
)
from onnx import TensorProto, helper, numpy_helper

import onnx_adapt as oa
from onnx_adapt.errors import SaveError
from onnx_adapt.model import file as model_file


def limit(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let the models of these tests pass the limit of protobuf, 2 GB."""
    monkeypatch.setattr(model_file, "PROTOBUF_LIMIT", size)


def test_data_moves_out_only_past_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = oa.open_model(write(tmp_path / "m.onnx", dense()))
    size = (tmp_path / "m.onnx").stat().st_size
    limit(monkeypatch, size)
    assert not oa.save_model(model, tmp_path / "in.onnx").externalised
    limit(monkeypatch, size - 1)
    saved = oa.save_model(model, tmp_path / "out.onnx")
    assert saved.externalised
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
    assert saved.externalised
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
    assert saved.externalised
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
    assert saved.externalised
    onnx.checker.check_model(str(saved.path))
    oa.save_model(oa.remove(oa.open_model(saved.path)), tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()
