"""Insertion: what goes into a graph, what stays as it was, what the model computes then."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import trained
from slot_models import (
    MLP,
    MODELS,
    adapter_feeds,
    assert_sound,
    bump,
    dense,
    model_of,
    proto_of,
    run,
    weight,
)

import onnx_adapt as oa
from onnx_adapt.errors import SiteError, SiteNotFoundError, SlotError

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def _close(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, 1e-4, 1e-4)


def _ops(graph: onnx.GraphProto) -> list[str]:
    return [node.op_type for node in graph.node]


def test_the_plain_slot_is_four_nodes_right_after_its_producer() -> None:
    adapted = oa.insert(model_of(MLP), after="first")
    assert " ".join(_ops(adapted.proto.graph)) == "MatMul MatMul Relu MatMul Add Relu MatMul"
    assert_sound(adapted)


def test_only_the_producers_output_is_renamed() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first")
    old = list(base.proto.graph.node)
    new = [node for node in adapted.proto.graph.node if not node.metadata_props]
    assert [n.SerializeToString() for n in new[1:]] == [n.SerializeToString() for n in old[1:]]
    (slot,) = oa.list_slots(adapted)
    assert list(new[0].output) == [slot.inner]
    assert slot.inner != slot.output == "a"
    new[0].output[0] = "a"
    assert new[0] == old[0]


def test_with_nothing_fed_the_outputs_are_the_bases() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act", "second"], bias=True)
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()


def test_with_weights_fed_the_slot_computes_its_formula() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    a = bump(X @ weight(base, "w1"), feeds, "first")
    b = bump(np.maximum(a, 0), feeds, "act")
    _close(run(adapted, {"x": X, **feeds})[0], b @ weight(base, "w2"))


@pytest.mark.parametrize("sizes", [(1, 7), (0, 3), (64, 2)])
def test_every_slot_takes_a_bottleneck_of_its_own(sizes: tuple[int, int]) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "act"])
    slots, rng = oa.list_slots(adapted), np.random.default_rng(0)
    feeds = adapter_feeds(slots[:1], rng, sizes[0]) | adapter_feeds(slots[1:], rng, sizes[1])
    a = bump(X @ weight(base, "w1"), feeds, "first")
    b = bump(np.maximum(a, 0), feeds, "act")
    _close(run(adapted, {"x": X, **feeds})[0], b @ weight(base, "w2"))


def test_insert_after_a_graph_output_keeps_its_name_and_type() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="second")
    assert adapted.proto.graph.output == base.proto.graph.output
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    wanted = bump(np.maximum(X @ weight(base, "w1"), 0) @ weight(base, "w2"), feeds, "second")
    _close(run(adapted, {"x": X, **feeds})[0], wanted)


def test_a_tensor_that_is_read_and_an_output_changes_for_both() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] a, float[n,4] y) <{dense("w1")}>
    {{ a = MatMul(x, w1)  y = Neg(a) }}""")
    adapted = oa.insert(base, after="a")
    feeds = adapter_feeds(oa.list_slots(adapted), np.random.default_rng(0))
    a, y = run(adapted, {"x": X, **feeds})
    _close(a, bump(X @ weight(base, "w1"), feeds, "a"))
    _close(y, -a)


@pytest.mark.parametrize("at_once", [True, False])
def test_slots_on_one_site_stack_in_order(at_once: bool) -> None:
    base = model_of(MLP)
    if at_once:
        adapted = oa.insert(base, after=["first", "a", "main:a"])
    else:
        adapted = oa.insert(
            oa.insert(oa.insert(base, after="first"), after="a"), after="first"
        )
    slots = oa.list_slots(adapted)
    assert len({slot.name for slot in slots}) == 3
    feeds = adapter_feeds(slots, np.random.default_rng(0))
    a = X @ weight(base, "w1")
    for slot in slots:
        a = bump(a, feeds, slot.name)
    _close(run(adapted, {"x": X, **feeds})[0], np.maximum(a, 0) @ weight(base, "w2"))
    assert_sound(adapted)


def test_insertion_leaves_its_argument_as_it_was() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first")
    before = base.proto.SerializeToString(), adapted.proto.SerializeToString()
    oa.insert(adapted, after=["first", "second"], bias=True)
    assert (base.proto.SerializeToString(), adapted.proto.SerializeToString()) == before


def test_a_refused_insertion_leaves_its_argument_as_it_was() -> None:
    base = model_of(MLP)
    before = base.proto.SerializeToString()
    with pytest.raises(SiteNotFoundError):
        oa.insert(base, after=["first", "nowhere"])
    assert base.proto.SerializeToString() == before


def test_each_weight_is_an_initializer_and_an_input_with_the_slots_own_symbol() -> None:
    adapted = oa.insert(model_of(MLP), after=["first", "second"], bias=True)
    stored = {t.name: tuple(t.dims) for t in adapted.proto.graph.initializer}
    inputs = {v.name: v.type.tensor_type for v in adapted.proto.graph.input}
    symbols = []
    for slot in oa.list_slots(adapted):
        shapes = {"down": (4, 0), "up": (0, 4), "down_bias": (0,), "up_bias": (4,)}
        found = set()
        for part, shape in shapes.items():
            name = f"adapter.{slot.name}.{part}"
            assert stored[name] == shape
            dims = [d.dim_param or d.dim_value for d in inputs[name].shape.dim]
            assert [d for d in dims if d == 4] == [s for s in shape if s]
            found.update(d for d in dims if isinstance(d, str))
            assert inputs[name].elem_type == onnx.TensorProto.FLOAT
        symbols += found
    assert len(symbols) == len(set(symbols)) == 2


def test_a_slots_symbol_is_none_that_the_model_uses() -> None:
    base = model_of(MLP.replace("[n,4]", "[r_first,4]"))
    adapted = oa.insert(base, after="first")
    down = next(v for v in adapted.proto.graph.input if v.name.endswith(".down"))
    assert down.type.tensor_type.shape.dim[1].dim_param not in ("", "r_first")


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("baked", [True, False])
def test_a_fixed_bottleneck_starts_as_the_identity(baked: bool, size: int) -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after=["first", "second"], bottleneck=size, baked=baked)
    assert weight(adapted, "adapter.first.down").shape == (4, size)
    assert 0 < np.abs(weight(adapted, "adapter.first.down")).max() <= 0.5
    assert not weight(adapted, "adapter.first.up").any()
    assert run(adapted, {"x": X})[0].tobytes() == run(base, {"x": X})[0].tobytes()
    assert {slot.bottleneck for slot in oa.list_slots(adapted)} == {size}


def test_a_fixed_swappable_bottleneck_is_a_fixed_dimension() -> None:
    adapted = oa.insert(model_of(MLP), after="first", bottleneck=5)
    inputs = {v.name: v.type.tensor_type.shape.dim for v in adapted.proto.graph.input}
    assert [d.dim_value for d in inputs["adapter.first.down"]] == [4, 5]
    assert [d.dim_value for d in inputs["adapter.first.up"]] == [5, 4]


def test_baked_slots_add_no_input_and_have_64_unless_told() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", baked=True)
    assert adapted.proto.graph.input == base.proto.graph.input
    assert weight(adapted, "adapter.first.down").shape == (4, 64)
    (slot,) = oa.list_slots(adapted)
    assert (slot.swappable, slot.bottleneck) == (False, 64)


def test_the_seed_decides_the_fresh_weights() -> None:
    base = model_of(MLP)

    def down(seed: int, slot: str) -> bytes:
        adapted = oa.insert(base, after=["first", "second"], bottleneck=5, seed=seed)
        return weight(adapted, f"adapter.{slot}.down").tobytes()

    assert down(1, "first") == down(1, "first")
    assert len({down(1, "first"), down(2, "first"), down(1, "second")}) == 3
    unsaid = oa.insert(base, after=["first", "second"], bottleneck=5)
    assert weight(unsaid, "adapter.first.down").tobytes() == down(0, "first")


def test_parts_are_in_the_order_of_the_formula_however_they_are_given() -> None:
    parts = ("down", "up", "down_bias", "up_bias", "scale", "gain")
    for given in (parts, parts[::-1], sorted(parts)):
        (slot,) = oa.list_slots(oa.insert(model_of(MLP), after="first", parts=given))
        assert slot.parts == parts


@pytest.mark.parametrize("ir_version", [3, 4, 7, 8, 10, 11])
def test_only_an_ir_version_below_4_is_raised(ir_version: int) -> None:
    proto = proto_of(MLP)
    proto.ir_version = ir_version
    if ir_version == 3:  # there, every initializer is an input
        for tensor in proto.graph.initializer:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, 1, list(tensor.dims))
            )
    onnx.checker.check_model(proto)
    adapted = oa.insert(oa.Model(proto), after="first")
    assert adapted.proto.ir_version == max(ir_version, 4)
    onnx.checker.check_model(adapted.proto)
    assert run(adapted, {"x": X})[0].tobytes() == run(proto, {"x": X})[0].tobytes()


def test_a_glob_takes_what_can_take_a_slot_and_names_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[n,4] y) <{dense("w1")}> {{
      [block_1] y = MatMul(x, w1)
      [block_2] dead = MatMul(y, w1)
    }}""")
    with caplog.at_level(logging.WARNING, "onnx_adapt"):
        adapted = oa.insert(base, after="block_*")
    assert [slot.tensor for slot in oa.list_slots(adapted)] == ["y"]
    assert "dead" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message", "hint"),
    [
        ({"bottleneck": 0}, SlotError, "bottleneck of 0", "64"),
        ({"bottleneck": -3}, SlotError, "bottleneck of -3", "1 or more"),
        ({"activation": "rleu"}, SlotError, "'rleu'", "relu"),
        ({"parts": ("down",)}, SlotError, "needs 'up'", ""),
        ({"seed": -1}, SlotError, "seed of -1", "0 or more"),
        ({"parts": ()}, SlotError, "no parts", ""),
        ({"parts": ("down", "up", "middle")}, SlotError, "'middle'", "down_bias"),
        ({"parts": ("scale",), "bias": True}, SlotError, "needs 'down'", ""),
        ({"norm_after": "nowhere"}, SlotError, "norm|fit", ""),
        ({"after": []}, SiteError, "no place", "sites"),
        ({"after": "frist"}, SiteNotFoundError, "'frist'", "first"),
        ({"after": "w1"}, SiteNotFoundError, "a weight", "node"),
        ({"after": "x"}, SiteNotFoundError, "an input", "node"),
        ({"after": ""}, SiteNotFoundError, "''", ""),
    ],
)
def test_a_slot_that_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, hint: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        oa.insert(model_of(MLP), **{"after": "first", **options})
    assert hint in caught.value.hint


def test_a_checkpoint_goes_where_it_was_trained_in_the_model_it_was_loaded_for(
    tmp_path: Path,
) -> None:
    base, checkpoint = trained(tmp_path)
    with pytest.raises(TypeError, match="'checkpoint'"):
        oa.insert(base, after="fc1", checkpoint=checkpoint)
    with pytest.raises(TypeError, match="'after'"):
        oa.insert_checkpoint(base, checkpoint, after="fc1")
    other = base.copy()
    other.proto.graph.initializer[0].name = "renamed"
    other.proto.graph.node[0].input[1] = "renamed"
    with pytest.raises(SlotError, match="another model") as caught:
        oa.insert_checkpoint(other, checkpoint)
    assert "load it for this one" in caught.value.hint


def test_a_part_given_alone_is_ia3() -> None:
    base = model_of(MLP)
    adapted = oa.insert(base, after="first", parts="scale")
    scale = np.array([1.5, -1, 0, 2], np.float32)
    wanted = np.maximum(X @ weight(base, "w1") * scale, 0) @ weight(base, "w2")
    _close(run(adapted, {"x": X, "adapter.first.scale": scale})[0], wanted)


def test_an_adapted_file_takes_more_slots() -> None:
    adapted = oa.insert(oa.open_model(MODELS / "plcmos.onnx"), after="Gemm_48")
    more = oa.insert(adapted, after=["Gemm_50", "Gemm_48"])
    assert [slot.name for slot in oa.list_slots(more)] == ["Gemm_48", "Gemm_50", "Gemm_48.2"]
