"""Batched slots: their formula, what they refuse, and what becomes of files and models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from slot_formula import (
    CASES,
    PLAIN,
    RANK,
    SOURCE_WIDTH,
    WIDTH,
    base_norm,
    formula,
    run_nodes,
    slot_of_case,
)
from slot_models import BRANCHES, MLP, assert_sound, cli, dense, model_of, saved
from trained_cases import CASES as TRAINED

import onnx_adapt as oa
from onnx_adapt.dtypes import DTYPES
from onnx_adapt.edit.damage import damages
from onnx_adapt.errors import AdapterError, MismatchError, SlotError
from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.formula import slot_nodes
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import Norm, slot_value
from onnx_adapt.slot.parts import PARTS
from onnx_adapt.slot.weights import neutral_rows, part_shape, row_shape

ROWS = 3
SHAPES = {2: (ROWS * 4,), 3: (ROWS, 4), 4: (ROWS, 2, 2)}
SHARED = [
    name
    for name, case in CASES.items()
    if "norm_after" not in case
    and not {"gate", "f_up"} & set(case.get("parts", "down up").split())
]
CHANNELS = [
    name
    for name in SHARED
    if not {"norm", "plus"} & set(CASES[name])
    and not {"norm_weight", "skip"} & set(CASES[name].get("parts", "").split())
]


def _row_weights(slot: Slot, feeds: dict[str, Any], row: int) -> dict[str, Any]:
    """The feeds of an ordinary slot that computes what one row should get."""
    own = dict(feeds)
    rows = {part: PARTS[part].row for part in slot.parts}
    for part, name in ((part, row.name) for part, row in rows.items() if row):
        if slot.weight(name) in own:
            value, key = own.pop(slot.weight(name))[row], slot.weight(part)
            flat = value.reshape(-1).astype(np.float64)
            shape = own[key].shape
            if part == "up":
                flat = flat.reshape(
                    (1, -1, *(1,) * (slot.rank - 2)) if slot.axis == 1 else (-1, 1)
                )
                own[key] = own[key] * flat
            elif part == "scale":
                own[key] = own[key] * flat.reshape(shape)
            else:
                own[key] = own[key] + flat.reshape(shape)
    return own


def _check(slot: Slot, leading: tuple[int, ...], tolerance: float) -> None:
    """Nodes == oracle == the plain formula row by row, for random values of each row."""
    check_slot(slot, 17)
    rng, dtype = np.random.default_rng(5), DTYPES[slot.dtype]

    def tensor(width: int) -> np.ndarray:
        space = (4, 3, 2)[: slot.rank - 2]
        shape = (ROWS, width, *space) if slot.axis == 1 else (*leading, width)
        return rng.standard_normal(shape).astype(dtype)

    feeds = {"t": tensor(WIDTH)}
    if slot.source == "x":
        feeds["x"] = tensor(SOURCE_WIDTH)
    if slot.plus:
        feeds["z"] = tensor(WIDTH)
    shapes = {part: part_shape(slot, part, RANK) for part in slot.parts}
    shapes |= {part: row_shape(slot, part, ROWS, RANK) for part in slot.row_parts}
    weights = {
        part: rng.standard_normal(shape).astype(dtype) for part, shape in shapes.items()
    }
    feeds |= {slot.weight(part): value for part, value in weights.items()}
    norm, values = base_norm(dtype, rng) if slot.norm else (None, [])
    plain = replace(slot, batched=False)
    wanted = []
    for row in range(ROWS):
        own = _row_weights(slot, feeds, row)
        for name in {"t", "x", "z"} & set(own):
            whole = own[name]
            by_row = whole if slot.axis == 1 else whole.reshape(ROWS, -1, whole.shape[-1])
            own[name] = by_row[row : row + 1]
        wanted.append(formula(plain, own, values or None))
    expected = np.concatenate(wanted).reshape(feeds["t"].shape)
    oracle_norm = (
        Norm(*(v.astype(np.float64) for v in values), epsilon=1e-3) if values else None
    )
    oracle = slot_value(
        slot, feeds["t"], feeds[slot.source], weights, oracle_norm, feeds.get("z")
    )
    np.testing.assert_allclose(oracle, expected, 1e-6, 1e-6)
    got = run_nodes(slot, 17, feeds | dict(zip("gb", values, strict=False)), norm)
    assert got.dtype == dtype
    assert np.abs(got - expected).max() / np.abs(expected).max() <= tolerance


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("case", SHARED)
def test_each_row_is_the_formula_with_what_is_its_own(case: str, rank: int) -> None:
    _check(slot_of_case(case, batched=True, rank=rank), SHAPES[rank], 3e-6)


@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("case", CHANNELS)
def test_each_row_of_channels_is_the_formula_with_what_is_its_own(
    case: str, rank: int
) -> None:
    _check(slot_of_case(case, batched=True, rank=rank, axis=1), (), 3e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_rows_have_the_element_type_of_the_slot(dtype: str) -> None:
    slot = slot_of_case("everything", batched=True, rank=2, dtype=dtype, norm_after="")
    parts = tuple(p for p in slot.parts if not p.startswith(("gate", "after")))
    tolerance = 1e-2 if dtype == "float16" else 1e-6
    _check(replace(slot, parts=parts), SHAPES[2], tolerance)


@pytest.mark.parametrize(("axis", "rank"), [(-1, 2), (-1, 3), (-1, 4), (1, 3), (1, 4), (1, 5)])
@pytest.mark.parametrize("case", CHANNELS)
def test_what_rows_have_by_default_changes_nothing(case: str, axis: int, rank: int) -> None:
    slot = slot_of_case(case, batched=True, axis=axis, rank=rank)
    rng = np.random.default_rng(4)
    shape = (2, WIDTH, 4, 3, 2)[:rank] if axis == 1 else (*(2, 4, 3)[: rank - 1], WIDTH)
    feeds = {"t": rng.standard_normal(shape).astype(np.float32)}
    if slot.source == "x":
        shape = tuple(SOURCE_WIDTH if size == WIDTH else size for size in shape)
        feeds["x"] = rng.standard_normal(shape).astype(np.float32)
    for part in slot.parts:
        draw = rng.standard_normal(part_shape(slot, part, RANK)).astype(np.float32)
        feeds[slot.weight(part)] = draw
    plain = run_nodes(replace(slot, batched=False), 17, feeds)
    rows = {slot.weight(part): value for part, value in neutral_rows(slot).items()}
    np.testing.assert_array_equal(run_nodes(slot, 17, feeds | rows), plain)


@pytest.mark.parametrize(
    ("case", "rank", "count"),
    [("plain", 3, 0), ("plain", 2, 2), ("parallel", 2, 3), ("skip", 4, 2), ("ia3", 2, 2)],
)
def test_no_tensor_is_reshaped_twice(case: str, rank: int, count: int) -> None:
    """What goes in once each, and what comes out; not even that where the rank is 3."""
    nodes = slot_nodes(slot_of_case(case, batched=True, rank=rank), 17)
    assert [node.op_type for node in nodes].count("Reshape") == count


@pytest.mark.parametrize("case", sorted(set(CASES) - set(SHARED)))
def test_what_is_no_sum_over_the_bottleneck_is_refused(case: str) -> None:
    with pytest.raises(SlotError, match="cannot give each row an adapter") as caught:
        check_slot(slot_of_case(case, batched=True, rank=3), 17)
    assert "without --batched" in caught.value.hint


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rank": 0}, "rank of tensor 'y' is unknown"),
        ({"rank": 1}, "rank of tensor 'y' is 1"),
        ({"bottleneck": 4}, "bottleneck is fixed"),
        ({"swappable": False}, "bottleneck is fixed"),
    ],
)
def test_a_slot_that_cannot_have_rows_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(SlotError, match=f"cannot give each row an adapter: .*{why}"):
        check_slot(replace(PLAIN, **{"batched": True, "rank": 3, **change}), 17)


SEQUENCE = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,seq,4] x) => (float[batch,seq,4] y) <{dense("w1")}, {dense("w2", seed=1)}> {{
  [turned] t = Transpose<perm=[1,0,2]>(x)
  [first] a = MatMul(t, w1)
  [back] b = Transpose<perm=[1,0,2]>(a)
  [second] c = MatMul(b, w2)
  y = Tanh(c) }}"""
FLAT = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[batch,seq,4] x) => (float[batch,seq,4] y)
<{dense("w1")}, int64[2] flat = {{-1, 4}}> {{
  t = Transpose<perm=[1,0,2]>(x)
  f = Reshape(t, flat)
  [first] a = MatMul(f, w1)
  s = Shape(t)
  r = Reshape(a, s)
  y = Transpose<perm=[1,0,2]>(r) }}"""


@pytest.mark.parametrize("text", [SEQUENCE, FLAT])
def test_a_tensor_with_the_sequence_in_front_is_refused_by_name(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = model_of(text)
    adapted = oa.insert(base, after="first", batched=True)
    report = oa.verify(base, adapted)
    assert [check.name for check in report.checks if not check.passed] == ["rows"]
    with pytest.raises(MismatchError, match="slot 'first'") as caught:
        report.raise_for_mismatch()
    assert "without --batched" in caught.value.hint
    path = saved(base, tmp_path / "base.onnx")
    code, _, err = cli(capsys, "insert", str(path), "--after", "first", "--batched")
    assert code == 1
    assert "slot 'first'" in err
    assert "insert without --batched" in err
    assert [file.name for file in tmp_path.iterdir()] == ["base.onnx"]
    assert oa.verify(base, oa.insert(base, after="first")).passed


def test_of_several_slots_the_wrong_one_is_named() -> None:
    base = model_of(SEQUENCE)
    report = oa.verify(base, oa.insert(base, after=["second", "first"], batched=True))
    (rows,) = (check for check in report.checks if check.name == "rows")
    assert "'first'" in rows.detail
    assert oa.verify(base, oa.insert(base, after="second", batched=True)).passed


@pytest.mark.parametrize("text", [MLP, BRANCHES])
def test_rows_of_rank_two_and_in_branches_are_proved(text: str) -> None:
    base = model_of(text)
    after = ["first", "second"] if text == MLP else ["before", "yes", "no"]
    adapted = oa.insert(base, after=after, batched=True, bias=True)
    assert_sound(adapted)
    report = oa.verify(base, adapted)
    assert report.passed, report.checks
    assert [c.name for c in report.checks if c.name == "rows"] == ["rows"]
    assert oa.remove(adapted).proto == base.proto


def test_a_model_that_takes_one_row_at_a_time_is_refused() -> None:
    base = model_of(MLP.replace("float[n,4]", "float[1,4]"))
    report = oa.verify(base, oa.insert(base, after="first", batched=True))
    (rows,) = (check for check in report.checks if check.name == "rows")
    assert not rows.passed


@pytest.mark.parametrize("op", ["Add", "Div"])
def test_a_mask_that_does_something_else_is_found(op: str) -> None:
    base = model_of(SEQUENCE)
    adapted = oa.insert(base, after="second", batched=True)
    (node,) = (n for n in adapted.proto.graph.node if n.name.endswith("/masked"))
    node.op_type = op
    assert {c.name for c in oa.verify(base, adapted).checks if not c.passed} >= {"on"}
    assert damages(adapted)


def test_no_two_slots_share_a_symbol() -> None:
    adapted = oa.insert(model_of(SEQUENCE), after=["first", "second"], batched=True, bias=True)
    owners: dict[str, str] = {}
    for value in adapted.proto.graph.input[1:]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                slot = value.name.split(".")[1]
                assert owners.setdefault(dim.dim_param, slot) == slot
    row_parts = {"mask", "row_up_bias"}
    names = {v.name.rpartition(".")[2] for v in adapted.proto.graph.input[1:]}
    assert names == {"down", "up", "down_bias", "up_bias", *row_parts}
    assert damages(adapted) == []


CASE = "peft_bert_lora_default_ts"


def _trained(**options: Any) -> tuple[oa.Model, oa.Model, oa.Checkpoint]:
    base = oa.open_model(TRAINED[CASE].base)
    checkpoint = oa.load_checkpoint(TRAINED[CASE].adapter, base)
    return base, oa.insert_checkpoint(base, checkpoint, **options), checkpoint


def test_removing_batched_slots_gives_the_base_byte_for_byte(tmp_path: Path) -> None:
    base, batched, _ = _trained(batched=True)
    path = saved(batched, tmp_path / "batched.onnx")
    again = saved(oa.remove(oa.open_model(path)), tmp_path / "again.onnx")
    assert again.read_bytes() == TRAINED[CASE].base.read_bytes()
    one = oa.list_slots(batched)[0].name
    rest = oa.remove(batched, slots=one)
    assert damages(rest) == []
    assert oa.verify(base, rest).passed


def test_adapter_files_know_nothing_of_rows() -> None:
    _, ordinary, checkpoint = _trained()
    _, batched, _ = _trained(batched=True)
    folder = TRAINED[CASE].adapter
    one, two = (oa.convert(folder, model).feeds() for model in (ordinary, batched))
    assert list(one) == list(two)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    extra = {
        slot: {**parts, "mask": np.ones((1, 1, 1), np.float32)}
        for slot, parts in checkpoint.adapter.weights.items()
    }
    with pytest.raises(AdapterError, match="mask"):
        oa.AdapterSession(batched, {"odd": replace(checkpoint.adapter, weights=extra)})


@pytest.mark.parametrize("change", [oa.bake, lambda m: oa.fill(m, _trained()[2].adapter)])
def test_a_batched_model_has_no_default_but_the_base(change: Any) -> None:
    with pytest.raises(AdapterError, match="batched") as caught:
        change(_trained(batched=True)[1])
    assert "without --batched" in caught.value.hint


@pytest.mark.parametrize("gone", ["input", "initializer"])
def test_a_mask_that_another_tool_took_away_is_missed(gone: str) -> None:
    _, batched, _ = _trained(batched=True)
    items = getattr(batched.proto.graph, gone)
    index = next(i for i, item in enumerate(items) if item.name.endswith(".mask"))
    del items[index]
    assert any("mask" in text for text in damages(batched))


def test_a_mask_of_fixed_size_is_missed() -> None:
    _, batched, _ = _trained(batched=True)
    value = next(v for v in batched.proto.graph.input if v.name.endswith(".mask"))
    value.type.tensor_type.shape.dim[0].dim_value = 1
    assert any("fixed size" in text for text in damages(batched))


def test_the_command_inserts_and_lists_batched_slots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = saved(model_of(MLP), tmp_path / "mlp.onnx"), tmp_path / "out.onnx"
    code, table, _ = cli(
        capsys, "insert", str(base), "--after", "first", "--batched", "-o", str(out)
    )
    assert code == 0
    assert "any (batched)" in table
    assert onnx.load(out) == oa.insert(oa.open_model(base), after="first", batched=True).proto
    (slot,) = json.loads(cli(capsys, "slots", str(out), "--json")[1])["slots"]
    assert slot["rows"] == {"mask": "adapter.first.mask"}
    assert cli(capsys, "verify", str(base), str(out))[0] == 0
    assert cli(capsys, "check", str(out))[0] == 0


@pytest.mark.parametrize("option", ["--baked", "--bottleneck=4"])
def test_the_command_refuses_what_rows_rule_out(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(model_of(MLP), tmp_path / "mlp.onnx")
    code, _, err = cli(capsys, "insert", str(base), "--after", "first", "--batched", option)
    assert code == 2
    assert f"{option.split('=')[0]} has no effect with --batched" in err


def test_graphsurgeon_keeps_what_rows_need() -> None:
    gs = pytest.importorskip("onnx_graphsurgeon")
    from onnx_adapt import graphsurgeon

    base = gs.import_onnx(model_of(SEQUENCE).proto)
    model = oa.Model(
        graphsurgeon.export_onnx(graphsurgeon.insert(base, after="second", batched=True))
    )
    assert damages(model) == []
    assert oa.verify(model_of(SEQUENCE), model, weights=False).checks[-2].name == "rows"


def test_a_slot_of_ids_can_have_rows_whatever_its_rank() -> None:
    for rank, shape in {2: (6,), 3: (2, 3), 4: (2, 3, 1)}.items():
        slot = replace(
            PLAIN,
            parts=("up", "table"),
            source="ids",
            source_width=9,
            batched=True,
            rank=rank,
            activation="identity",
        )
        check_slot(slot, 17)
        rng = np.random.default_rng(1)
        feeds = {
            "t": rng.standard_normal((*shape, WIDTH)).astype(np.float32),
            "ids": rng.integers(0, 9, shape),
        }
        weights = {p: rng.standard_normal(part_shape(slot, p, 2)) for p in slot.parts}
        weights["mask"] = rng.standard_normal((2, 1, 2))
        given = {slot.weight(p): v.astype(np.float32) for p, v in weights.items()}
        hidden = weights["table"][feeds["ids"].reshape(2, -1)] * weights["mask"]
        wanted = feeds["t"] + (hidden @ weights["up"]).reshape(feeds["t"].shape)
        np.testing.assert_allclose(run_nodes(slot, 17, feeds | given), wanted, 1e-4, 1e-5)
        oracle = slot_value(slot, feeds["t"], feeds["ids"], weights)
        np.testing.assert_allclose(oracle, wanted, 1e-6, 1e-6)
