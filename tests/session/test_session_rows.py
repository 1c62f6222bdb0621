"""One adapter for each row of a batch: every row is what it would be alone."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from adapter_models import W1, adapted, bumped
from onnx import helper, numpy_helper
from session_adapters import BASE, DE, FR, X, close
from trained_cases import CASES

import onnx_adapt as oa
from onnx_adapt.errors import AdapterError, AdapterNotFoundError, RunError
from onnx_adapt.session.batches import count_rows, find_batch

ADAPTERS = {"fr": FR, "de": DE}


def _alone() -> dict[str | None, np.ndarray]:
    return {None: BASE, "fr": bumped(X, FR), "de": bumped(X, DE)}


@pytest.mark.parametrize(
    "rows",
    [
        ["fr", "de", None, "fr", "de", None],
        ["de", "de", "de", "fr", "fr", "fr"],
        [None, None, None, None, None, "fr"],
        ["fr"] * 6,
        [None] * 6,
    ],
)
def test_rows_come_back_in_order_each_with_its_own_adapter(rows: list[str | None]) -> None:
    with oa.AdapterSession(adapted(), ADAPTERS) as session:
        found = session.run({"x": X}, adapter=rows)["y"]
    expected = np.stack([_alone()[name][i] for i, name in enumerate(rows)])
    assert close(found, expected)


def test_rows_may_be_blends_adapters_in_memory_and_an_array_of_names() -> None:
    with oa.AdapterSession(adapted(), ADAPTERS) as session:
        blend = {"fr": 0.5, "de": 0.5}
        found = session.run({"x": X}, adapter=[blend, FR, FR, "fr", None, blend])["y"]
        blended = session.run({"x": X}, adapter=blend)["y"]
        assert close(found[[0, 5]], blended[[0, 5]])
        assert close(found[1:4], bumped(X, FR)[1:4])
        names = np.array(["fr", "de"] * 3)
        assert close(session.run({"x": X}, names)["y"][1::2], bumped(X, DE)[1::2])


@pytest.mark.parametrize("count", [0, 1, 5, 7])
def test_another_number_of_rows_than_adapters_is_refused(count: int) -> None:
    session = oa.AdapterSession(adapted(), ADAPTERS)
    with pytest.raises(RunError, match=f"adapters given is {count}") as caught:
        session.run({"x": X}, adapter=["fr"] * count)
    assert "each row" in caught.value.hint


def test_an_unknown_name_in_a_row_is_refused_before_anything_runs() -> None:
    session = oa.AdapterSession(adapted(), ADAPTERS)
    with pytest.raises(AdapterNotFoundError, match="'es'"):
        session.run({"x": X}, adapter=["fr", "es"] * 3)
    with pytest.raises(AdapterError):
        session.run({"x": X}, adapter=["fr", 3] * 3)  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["peft_bert_lora_default_ts", "ah_bert_seq_bn"])
def test_rows_of_a_real_model_are_what_they_are_alone(name: str) -> None:
    case = CASES[name]
    base = oa.open_model(case.base)
    trained = oa.load_checkpoint(case.adapter, base)
    model = oa.insert_checkpoint(base, trained)
    feeds = case.inputs()
    rows = len(next(iter(feeds.values())))
    with oa.AdapterSession(model, {"t": trained.adapter}) as session:
        off, on = session.run(feeds), session.run(feeds, "t")
        mixed = session.run(feeds, [None, *["t"] * (rows - 1)])
    for output, value in mixed.items():
        np.testing.assert_allclose(value[0], off[output][0], atol=1e-5)
        np.testing.assert_allclose(value[1:], on[output][1:], atol=1e-5)
        assert np.abs(on[output] - off[output]).max() > 1e-3


# Where the batch is


def _model(batch: int | str | None, *, axis: int = 0, total: bool = False) -> oa.Model:
    """`y = x @ W1.T` with the batch where it is asked for, and perhaps its sum."""
    shape: list[int | str | None] = [3, "n", 4] if axis else ["n", 4]
    shape[axis] = batch
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "fc")]
    values = [helper.make_tensor_value_info("y", 1, shape)]
    if total:
        nodes.append(helper.make_node("ReduceSum", ["y"], ["total"], "sum", keepdims=0))
        values.append(helper.make_tensor_value_info("total", 1, []))
    weight = numpy_helper.from_array(np.ascontiguousarray(W1.T), "w")
    given = [helper.make_tensor_value_info("x", 1, shape)]
    graph = helper.make_graph(nodes, "g", given, values, [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(proto, full_check=True)
    return oa.insert(oa.Model(proto), after="fc")


ONE, TWO = ({"fc": a.weights["fc1"]} for a in (FR, DE))


def _session(model: oa.Model, **options: Any) -> oa.AdapterSession:
    """A session of a `_model` with its adapters."""
    adapters = {n: oa.make_adapter(model, n, w) for n, w in (("one", ONE), ("two", TWO))}
    return oa.AdapterSession(model, adapters, **options)


def _truth(x: np.ndarray, weights: dict[str, Any]) -> np.ndarray:
    y = x @ W1.T
    parts = weights["fc"]
    return y + np.maximum(y @ parts["down"], 0) @ parts["up"]


@pytest.mark.parametrize("batch", ["n", "batch", None, 6])
def test_the_batch_axis_is_found(batch: int | str | None) -> None:
    with _session(_model(batch)) as session:
        found = session.run({"x": X}, adapter=["one", "two"] * 3)["y"]
    assert close(found[::2], _truth(X, ONE)[::2])
    assert close(found[1::2], _truth(X, TWO)[1::2])


@pytest.mark.parametrize("given", [1, {"x": 1, "y": 1}])
def test_the_batch_axis_can_be_given(given: int | dict[str, int | None]) -> None:
    model = _model("rows", axis=1)
    x = np.random.default_rng(1).standard_normal((3, 2, 4)).astype(np.float32)
    with _session(model, batch_axis=given) as session:
        found = session.run({"x": x}, adapter=["two", "one"])["y"]
    assert close(found[:, 0], _truth(x, TWO)[:, 0])
    assert close(found[:, 1], _truth(x, ONE)[:, 1])


def test_a_symbol_called_batch_is_the_batch_wherever_it_is() -> None:
    axes = find_batch(
        {"x": ["time", "batch_size", 4], "h": [2, "batch_size"]}, {"y": [9]}, None
    )
    assert axes.inputs == {"x": 1, "h": 1}
    assert axes.outputs == {"y": None}


def test_what_has_no_batch_axis_goes_to_every_group() -> None:
    axes = find_batch({"x": ["n", 4], "table": [7, 4], "flag": []}, {"y": ["n"]}, None)
    assert axes.inputs == {"x": 0, "table": None, "flag": None}
    assert not axes.fixed


@pytest.mark.parametrize(
    ("inputs", "axes"),
    [
        ({"ids": ["s72", "s53"], "mask": ["s43", "s5"]}, {"ids": 0, "mask": 0}),
        ({"ids": ["unk__1", 4], "mask": ["unk__2"]}, {"ids": 0, "mask": 0}),
        ({"x": [None, 4], "y": [None]}, {"x": 0, "y": 0}),
        ({"x": [None, "batch", 8]}, {"x": 1}),
        ({"x": ["seq", "N", 8], "h": [2, "N"]}, {"x": 1, "h": 1}),
        (
            {"x": ["rows", 4], "table": [7, 4], "flag": []},
            {"x": 0, "table": None, "flag": None},
        ),
        ({"x": ["batch", "time"], "lengths": ["time"]}, {"x": 0, "lengths": None}),
        ({"x": [1, 4]}, {"x": 0}),
        ({"x": [3, 4], "t": [5]}, {"x": 0, "t": None}),
    ],
)
def test_the_batch_is_the_symbol_called_so_or_what_leads_every_input(
    inputs: dict[str, list[int | str | None]], axes: dict[str, int | None]
) -> None:
    found = find_batch(inputs, {}, None)
    assert (found.inputs, found.unclear) == (axes, "")


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"x": ["seq", 8]}, "seq"),
        ({"x": [2, None, 8]}, "x"),
        ({"x": ["rows", 8], "y": ["items", 8]}, "items"),
        ({"x": ["batch", 8], "y": [None, 8]}, "y"),
        ({"x": []}, "no input"),
    ],
)
def test_a_batch_that_could_lie_elsewhere_has_to_be_named(
    inputs: dict[str, list[int | str | None]], named: str
) -> None:
    axes = find_batch(inputs, {}, None)
    with pytest.raises(RunError, match="not clear") as caught:
        count_rows(axes, {}, 2)
    assert named in str(caught.value)
    assert "batch_axis=" in str(caught.value)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "dynamo" in name])
def test_rows_of_what_torch_s_exporter_left_nameless_are_what_they_are_alone(
    name: str,
) -> None:
    case = CASES[name]
    feeds = case.inputs()
    rows = len(next(iter(feeds.values())))
    if not case.facts.get("supported", True) or rows < 2:
        return
    base = oa.open_model(case.base)
    trained = oa.load_checkpoint(case.adapter, base)
    with oa.AdapterSession(
        oa.insert_checkpoint(base, trained), {"t": trained.adapter}
    ) as session:
        off, on = session.run(feeds), session.run(feeds, "t")
        mixed = session.run(feeds, [None, *["t"] * (rows - 1)])
    for output, value in mixed.items():
        tolerance = 1e-5 * max(float(np.abs(on[output]).max()), 1.0)
        np.testing.assert_allclose(value[0], off[output][0], atol=tolerance)
        np.testing.assert_allclose(value[1:], on[output][1:], atol=tolerance)


def test_an_output_of_unknown_rank_is_put_together_if_it_has_the_rows() -> None:
    proto = _model("n").proto
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with _session(oa.Model(proto)) as session:
        found = session.run({"x": X}, adapter=["one", "two", "two"] * 2)["y"]
    assert close(found[0], _truth(X, ONE)[0])
    assert close(found[1:3], _truth(X, TWO)[1:3])


@pytest.mark.parametrize("given", ["0", 1.0, True, -1, {"x": "0"}])
def test_what_is_no_axis_is_refused(given: object) -> None:
    with pytest.raises(RunError, match="is no axis"):
        oa.AdapterSession(_model("n"), batch_axis=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [5, {"x": 2}, {"z": 0}])
def test_an_axis_or_name_that_is_not_there_is_refused(
    given: int | dict[str, int | None],
) -> None:
    if given == 5:
        session = _session(_model("n"), batch_axis=given)
        with pytest.raises(RunError, match="no input of the model has an axis"):
            session.run({"x": X}, adapter=["one", None] * 3)
        return
    with pytest.raises(RunError, match="batch_axis"):
        oa.AdapterSession(_model("n"), batch_axis=given)


def test_an_output_that_mixes_rows_cannot_be_put_together() -> None:
    session = _session(_model("n", total=True))
    with pytest.raises(RunError, match="'total' has no batch axis") as caught:
        session.run({"x": X}, adapter=["one", "two"] * 3)
    assert "outputs=" in caught.value.hint
    found = session.run({"x": X}, adapter=["one", "two"] * 3, outputs=["y"])
    assert list(found) == ["y"]


def test_an_output_that_only_looks_like_a_batch_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], "fc"),
        helper.make_node("Reshape", ["y", "flat"], ["z"], "reshape"),
    ]
    x = helper.make_tensor_value_info("x", 1, ["n", 4])
    z = helper.make_tensor_value_info("z", 1, ["n"])
    stored = [
        numpy_helper.from_array(np.ascontiguousarray(W1.T), "w"),
        numpy_helper.from_array(np.array([-1], np.int64), "flat"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [z], stored)
    opset = helper.make_opsetid("", 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    model = oa.insert(oa.Model(proto), after="fc")
    session = _session(model)
    with pytest.raises(RunError, match="is not the batch"):
        session.run({"x": X}, adapter=["one", "two"] * 3)
