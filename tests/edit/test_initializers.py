"""The weights of slots inside a model: initializer and input stay in step."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from adapter_models import trained
from onnx import numpy_helper
from slot_models import BRANCHES, MLP, MODELS, bump, model_of, run, saved, weight

import onnx_adapt as oa
from onnx_adapt.edit.weights import (
    add_weights,
    bake_weights,
    check_weights,
    drop_weights,
    fill_weights,
    make_swappable,
    read_weights,
)
from onnx_adapt.errors import SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)
PARTS = ("down", "up", "down_bias", "up_bias", "scale", "gain")


def _weights(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"down": (4, size), "up": (size, 4)}
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _stored(model: oa.Model) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.proto.graph.initializer}


def _dims(model: oa.Model) -> dict[str, list[int | str]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.proto.graph.input
    }


def _in_step(model: oa.Model) -> None:
    """Every input that has a default fits it, and nothing is there twice."""
    names = [tensor.name for tensor in model.proto.graph.initializer]
    inputs = [value.name for value in model.proto.graph.input]
    assert len(names) == len(set(names))
    assert len(inputs) == len(set(inputs))
    types = {v.name: v.type.tensor_type.elem_type for v in model.proto.graph.input}
    for name, dims in _dims(model).items():
        if name in names:
            tensor = _stored(model)[name]
            assert tensor.data_type == types[name]
            pairs = zip(dims, tensor.dims, strict=True)
            assert all(isinstance(d, str) or d == size for d, size in pairs)
    onnx.checker.check_model(model.proto, full_check=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_added_weights_are_the_given_numbers_little_endian(dtype: str) -> None:
    adapted = oa.insert(model_of(MLP), after="first", parts=PARTS)
    (slot,) = oa.list_slots(adapted)
    slot = type(slot)(**{f: getattr(slot, f) for f in slot.__slots__} | {"dtype": dtype})
    numpy_type = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    shapes = {"down": (4, 2), "up": (2, 4), "down_bias": (2,)}
    values = {p: rng.standard_normal(shapes.get(p, (4,))).astype(numpy_type) for p in PARTS}
    proto = onnx.ModelProto()
    add_weights(proto, slot, {**values, "down": np.asfortranarray(values["down"])})
    for tensor in proto.graph.initializer:
        part = tensor.name.rpartition(".")[2]
        assert tensor.raw_data == values[part].tobytes()
        assert np.array_equal(numpy_helper.to_array(tensor), values[part])
    assert [v.name for v in proto.graph.input] == [t.name for t in proto.graph.initializer]
    drop_weights(proto, [slot])
    assert proto == onnx.ModelProto(graph=onnx.GraphProto())


def test_the_weights_of_a_new_slot_are_read_as_they_are_stored() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"], parts=PARTS)
    read = read_weights(adapted, oa.list_slots(adapted))
    assert list(read) == ["first", "act"]
    assert {part: value.shape for part, value in read["first"].items()} == {
        "down": (4, 0),
        "up": (0, 4),
        "down_bias": (0,),
        "up_bias": (4,),
        "scale": (4,),
        "gain": (4,),
    }
    assert (read["act"]["scale"] == 1).all()
    assert not read["act"]["up_bias"].any()


def test_filled_weights_are_the_default_of_their_slot_alone() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    values = _weights(5)
    filled = fill_weights(adapted, {"act": values})
    _in_step(filled)
    h = np.maximum(X @ weight(base, "w1"), 0)
    fed = {f"adapter.act.{part}": value for part, value in values.items()}
    wanted = bump(h, fed, "act") @ weight(base, "w2")
    np.testing.assert_allclose(run(filled, {"x": X})[0], wanted, 1e-4, 1e-4)
    again = _weights(2, seed=1)
    fed = {f"adapter.act.{part}": value for part, value in again.items()}
    wanted = bump(h, fed, "act") @ weight(base, "w2")
    np.testing.assert_allclose(run(filled, {"x": X, **fed})[0], wanted, 1e-4, 1e-4)


def test_filling_leaves_its_argument_and_the_manifest_as_they_were() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    before = adapted.proto.SerializeToString()
    filled = fill_weights(adapted, {"first": _weights(5)})
    assert adapted.proto.SerializeToString() == before
    assert oa.list_slots(filled) == oa.list_slots(adapted)


def test_filled_weights_survive_a_file_and_are_read_back(tmp_path: Path) -> None:
    adapted = oa.insert(oa.open_model(MODELS / "plcmos.onnx"), after="Gemm_48")
    (slot,) = oa.list_slots(adapted)
    rng = np.random.default_rng(0)
    width = slot.width
    values = {"down": rng.standard_normal((width, 64)), "up": rng.standard_normal((64, width))}
    filled = oa.open_model(
        saved(fill_weights(adapted, {"Gemm_48": values}), tmp_path / "f.onnx")
    )
    assert any(
        len(t.raw_data) < 64 for t in filled.proto.graph.initializer if "down" in t.name
    )
    read = read_weights(filled, oa.list_slots(filled))["Gemm_48"]
    for part, value in values.items():
        assert np.array_equal(read[part], value.astype(np.float32))
    emptied = fill_weights(
        filled, {"Gemm_48": {"down": values["down"][:, :0], "up": values["up"][:0]}}
    )
    assert emptied.proto == adapted.proto


def test_weights_that_follow_in_memory_order_and_strides_are_stored_by_value() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    values = _weights(6)
    strided = {"down": values["down"].T.copy().T, "up": np.repeat(values["up"], 2, 0)[::2]}
    assert not strided["down"].flags.c_contiguous
    a, b = fill_weights(adapted, {"first": values}), fill_weights(adapted, {"first": strided})
    assert a.proto == b.proto


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nowhere": _weights(3)}, "'nowhere'"),
        ({"first": {"down": _weights(3)["down"]}}, "down, up"),
        ({"first": {**_weights(3), "scale": np.ones(4)}}, "scale"),
        ({"first": {**_weights(3), "up": np.zeros((2, 4))}}, "bottleneck"),
        ({"first": {**_weights(3), "up": np.zeros((3, 5))}}, r"\[3, 5\], not \[3, 4\]"),
        ({"first": {**_weights(3), "down": np.zeros((4,))}}, r"shape \[4\]"),
        ({"first": {**_weights(3), "down": np.zeros((3, 4))}}, r"shape \[3, 4\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(values: dict, message: str) -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    before = adapted.proto.SerializeToString()
    with pytest.raises(SlotError, match=message):
        fill_weights(adapted, values)
    assert adapted.proto.SerializeToString() == before


def test_a_fixed_bottleneck_takes_no_other() -> None:
    adapted = oa.insert(model_of(MLP), after="first", bottleneck=5)
    _in_step(fill_weights(adapted, {"first": _weights(5)}))
    with pytest.raises(SlotError, match=r"\[4, 3\], not \[4, 5\]"):
        fill_weights(adapted, {"first": _weights(3)})


def test_a_base_has_no_slots_to_fill_or_bake() -> None:
    base = model_of(MLP)
    for change in (bake_weights, make_swappable, lambda m: fill_weights(m, {})):
        with pytest.raises(SlotError, match="no slots") as caught:
            change(base)
        assert "insert" in caught.value.hint


def test_baking_takes_the_inputs_and_keeps_the_numbers() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"], bias=True)
    biases = {"down_bias": np.ones(5), "up_bias": np.ones(4)}
    filled = fill_weights(adapted, {"first": {**_weights(5), **biases}})
    baked = bake_weights(filled)
    _in_step(baked)
    assert baked.proto.graph.input == base.proto.graph.input
    assert _stored(baked) == _stored(filled)
    assert [(s.swappable, s.bottleneck) for s in oa.list_slots(baked)] == [
        (False, 5),
        (False, 0),
    ]
    assert run(baked, {"x": X})[0].tobytes() == run(filled, {"x": X})[0].tobytes()
    assert oa.remove(baked).proto == base.proto


def test_opening_is_the_reverse_of_baking() -> None:
    adapted = oa.insert(model_of(BRANCHES), after=["yes", "before"], parts=PARTS)
    swappable = make_swappable(bake_weights(adapted))
    _in_step(swappable)
    assert swappable.proto == adapted.proto


def test_opening_is_the_reverse_of_baking_for_trained_weights_of_the_base_too(
    tmp_path: Path,
) -> None:
    base, checkpoint = trained(tmp_path)
    filled = oa.fill(oa.insert_checkpoint(base, checkpoint), checkpoint.adapter)
    baked = bake_weights(filled)
    _in_step(baked)
    assert baked.proto.graph.input == base.proto.graph.input
    swappable = make_swappable(baked)
    for model in (swappable, filled):  # inputs go by name
        model.proto.graph.input.sort(key=lambda value: value.name)
    assert swappable.proto == filled.proto


def test_opened_slots_take_any_bottleneck_and_keep_their_default() -> None:
    base = model_of(MLP)
    baked = oa.insert(base, after="first", baked=True, bottleneck=5)
    swappable = make_swappable(baked)
    _in_step(swappable)
    dims = _dims(swappable)["adapter.first.down"]
    assert dims[0] == 4
    assert isinstance(dims[1], str)
    assert _stored(swappable)["adapter.first.down"].dims == [4, 5]
    fed = {f"adapter.first.{part}": value for part, value in _weights(2).items()}
    wanted = np.maximum(bump(X @ weight(base, "w1"), fed, "first"), 0) @ weight(base, "w2")
    np.testing.assert_allclose(run(swappable, {"x": X, **fed})[0], wanted, 1e-4, 1e-4)


def test_slots_without_a_bottleneck_bake_and_open_too() -> None:
    adapted = oa.insert(model_of(MLP), after="first", parts="scale")
    filled = fill_weights(adapted, {"first": {"scale": np.full(4, 2.0)}})
    baked = bake_weights(filled)
    assert run(baked, {"x": X})[0].tobytes() == run(filled, {"x": X})[0].tobytes()
    assert make_swappable(baked).proto == filled.proto


def test_dropping_takes_a_slots_weights_and_no_other() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act", "first"], bias=True)
    slots = oa.list_slots(adapted)
    drop_weights(adapted.proto, [slots[0]])
    names = set(_stored(adapted))
    assert names == set(_dims(adapted)) - {"x"} | {"w1", "w2"}
    assert {n for n in names if n.startswith("adapter.")} == {
        slot.weight(part) for slot in slots[1:] for part in slot.parts
    }
    drop_weights(adapted.proto, slots)
    assert adapted.proto.graph.initializer == base.proto.graph.initializer
    assert adapted.proto.graph.input == base.proto.graph.input


@pytest.mark.parametrize("baked", [True, False])
def test_complete_weights_pass_the_check(baked: bool) -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"], bias=True, baked=baked)
    check_weights(adapted.proto, oa.list_slots(adapted))


def test_different_bottlenecks_inside_one_slot_fail_the_check() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    up = _stored(adapted)["adapter.first.up"]
    up.CopyFrom(numpy_helper.from_array(np.zeros((3, 4), np.float32), up.name))
    with pytest.raises(SlotError, match=r"adapter\.first|bottleneck"):
        check_weights(adapted.proto, oa.list_slots(adapted))


def test_weights_that_another_tool_took_are_not_read() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "act"])
    stored = adapted.proto.graph.initializer
    del stored[[tensor.name for tensor in stored].index("adapter.act.up")]
    assert list(read_weights(adapted, oa.list_slots(adapted)[:1])) == ["first"]
    with pytest.raises(SlotError, match=r"slot 'act' is damaged: .*adapter\.act\.up"):
        read_weights(adapted, oa.list_slots(adapted))
    with pytest.raises(SlotError, match=r"slot 'act' is damaged: .*adapter\.act\.up"):
        bake_weights(adapted)


def test_weights_of_another_element_type_fail_the_check() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    up = _stored(adapted)["adapter.first.up"]
    up.CopyFrom(numpy_helper.from_array(np.zeros((0, 4), np.float16), up.name))
    with pytest.raises(SlotError, match=r"adapter\.first\.up"):
        check_weights(adapted.proto, oa.list_slots(adapted))
