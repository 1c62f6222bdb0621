"""The bound of rounding errors: ONNX Runtime stays within it, and what is wrong does not."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper
from slot_formula import (
    CASES,
    CHANNEL_CASES,
    EPSILON,
    SOURCE_WIDTH,
    WIDTH,
    base_norm,
    run_nodes,
    shape,
    slot_of_case,
)
from slot_models import session

from onnx_adapt.dtypes import DTYPES
from onnx_adapt.proof.deviation import Deviation, slot_deviation
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.bounds import ARITHMETIC, FUNCTION_UNITS, exact
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.oracle import Norm, slot_bounded
from onnx_adapt.slot.weights import fan_in, part_shape

Weights = dict[str, np.ndarray[Any, Any]]


def _drawn(slot: Slot, size: int, seed: int = 0) -> Weights:
    """Weights whose effect has about the size of what they are applied to."""
    rng = np.random.default_rng(seed)
    weights = {}
    for part in slot.parts:
        draw = rng.standard_normal(part_shape(slot, part, size))
        draw /= math.sqrt(fan_in(slot, part)) if "down" in part else 1
        draw /= math.sqrt(size) if part.endswith("up") else 1
        weights[part] = draw.astype(DTYPES[slot.dtype])
    return weights


def _tensors(slot: Slot, dtype: Any, seed: int = 1, width: int = WIDTH) -> Weights:
    rng = np.random.default_rng(seed)
    tensors = {"t": rng.standard_normal(shape(slot, width)).astype(dtype)}
    if slot.source == "x":
        tensors["x"] = rng.standard_normal(shape(slot, SOURCE_WIDTH)).astype(dtype)
    if slot.plus:
        tensors["z"] = rng.standard_normal(shape(slot, width)).astype(dtype)
    return tensors


def _near(slot: Slot, opset: int, size: int = 8, norm: Any = None) -> Deviation:
    """A slot's nodes in ONNX Runtime against the formula's bound."""
    dtype, weights = DTYPES[slot.dtype], _drawn(slot, size)
    tensors = _tensors(slot, dtype)
    given = tensors | {f"adapter.s.{part}": value for part, value in weights.items()}
    node, oracle = None, None
    if slot.norm:
        node, values = base_norm(dtype, np.random.default_rng(2))
        given |= dict(zip("gb", values, strict=True))
        oracle = Norm(*(v.astype(np.float64) for v in values), epsilon=EPSILON)
    read = [tensors["t"], tensors[slot.source], run_nodes(slot, opset, given, node)]
    read += [tensors[slot.plus]] if slot.plus else []
    return slot_deviation(slot, read, weights, oracle)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("opset", [11, 17, 23])
@pytest.mark.parametrize("case", CASES)
def test_every_form_of_slot_is_within_its_bound(case: str, opset: int, dtype: str) -> None:
    found = _near(slot_of_case(case, dtype=dtype), opset)
    assert found.ratio <= 1
    assert found.shown
    assert found.judged >= 0.9 * 2 * 4 * WIDTH


@pytest.mark.parametrize("dtype", ["float32", "float16"])  # Conv has no float64 kernel
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("case", CHANNEL_CASES)
def test_every_form_on_a_channel_axis_is_within_its_bound(
    case: str, rank: int, dtype: str
) -> None:
    found = _near(slot_of_case(case, axis=1, rank=rank, dtype=dtype), 17)
    assert found.ratio <= 1
    assert found.shown


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_within_its_bound(activation: str, dtype: str) -> None:
    for opset in (8, 17, 23):
        found = _near(slot_of_case("biases", activation=activation, dtype=dtype), opset)
        assert found.ratio <= 1, opset
        assert found.shown


@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_the_bound_of_float32_is_a_few_digits_above_the_error_not_more(
    activation: str, width: int
) -> None:
    slot = replace(
        slot_of_case("biases", activation=activation), width=width, source_width=width
    )
    found = _wide(slot, width)
    assert found.bound / 1e4 < found.error < found.bound < 1e-3


def _wide(slot: Slot, width: int) -> Deviation:
    weights, tensors = _drawn(slot, 64), _tensors(slot, np.float32, width=width)
    given = tensors | {f"adapter.s.{part}": value for part, value in weights.items()}
    output = run_nodes(slot, 17, given)
    return slot_deviation(slot, [tensors["t"], tensors["t"], output], weights)


@pytest.mark.parametrize(
    "case", ["plain", "biases", "gain", "dora", "own_norm", "gate", "plus"]
)
def test_one_weight_that_is_a_few_bounds_off_is_seen(case: str) -> None:
    slot = slot_of_case(case)
    weights, tensors = _drawn(slot, 8), _tensors(slot, np.float32)
    read = [tensors["t"], tensors[slot.source]]
    plus = tensors.get(slot.plus)
    formula = slot_bounded(slot, *read, weights, None, plus)
    for part in slot.parts:
        moved = {key: value.astype(np.float64) for key, value in weights.items()}
        step = np.zeros(moved[part].shape)
        step.flat[0] = 1e-6
        moved[part] = moved[part] + step
        other = slot_bounded(slot, *read, moved, None, plus)
        reach = (np.abs(other.value - formula.value) / formula.bound).max() / 1e-6
        assert reach > 0, part
        moved[part] = moved[part] + step * (4 / reach / 1e-6 - 1)
        given = tensors | {
            f"adapter.s.{key}": value.astype(np.float32) for key, value in moved.items()
        }
        output = run_nodes(slot, 17, given)
        assert (
            slot_deviation(
                slot, [*read, output, *([plus] if slot.plus else [])], weights
            ).ratio
            > 1
        )
        assert 4 / reach < 1e-2, part


def _without(part: str) -> Callable[[Slot, Weights], tuple[Slot, Weights]]:
    return lambda slot, w: (slot, w | {part: np.zeros_like(w[part])})


def _with(part: str, change: Callable[[Any], Any]) -> Callable[[Slot, Weights], Any]:
    return lambda slot, w: (slot, w | {part: change(w[part]).astype(w[part].dtype)})


WRONG_FORMULAS: dict[str, Any] = {
    "no down_bias": _without("down_bias"),
    "no up_bias": _without("up_bias"),
    "gain 1e-3 off": _with("gain", lambda v: v * 1.001),
    "scale 1e-3 off": _with("scale", lambda v: v * 1.001),
    "units in another order": _with("up", lambda v: v[::-1]),
    "another activation": lambda slot, w: (replace(slot, activation="gelu_tanh"), w),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_a_wrong_formula_is_outside_of_its_bound(wrong: str, dtype: str) -> None:
    parts = "down up down_bias up_bias scale gain"
    slot = replace(
        slot_of_case("plain", dtype=dtype), parts=tuple(parts.split()), activation="gelu"
    )
    weights, tensors = _drawn(slot, 16), _tensors(slot, DTYPES[dtype])
    other, changed = WRONG_FORMULAS[wrong](slot, weights)
    given = tensors | {f"adapter.s.{part}": value for part, value in changed.items()}
    output = run_nodes(other, 17, given)
    assert slot_deviation(slot, [tensors["t"], tensors["t"], output], weights).ratio > 10


def test_channels_taken_for_positions_are_outside_of_the_bound() -> None:
    slot = slot_of_case("plain")
    weights = _drawn(slot, 8)
    t = np.random.default_rng(3).standard_normal((2, WIDTH, WIDTH)).astype(np.float32)
    given = {"t": t.swapaxes(1, 2)} | {f"adapter.s.{p}": v for p, v in weights.items()}
    output = run_nodes(slot, 17, {k: np.ascontiguousarray(v) for k, v in given.items()})
    assert slot_deviation(slot, [t, t, output.swapaxes(1, 2)], weights).ratio > 10


def test_a_value_that_vanishes_is_judged_by_what_was_summed() -> None:
    slot = replace(slot_of_case("lora"), width=1, source_width=WIDTH, source="x")
    rng = np.random.default_rng(4)
    x = rng.standard_normal((1, 1, WIDTH)).astype(np.float32)
    weights = {p: v.astype(np.float32) for p, v in _drawn(slot, 8).items()}
    zero = np.zeros((1, 1, 1), np.float32)
    term = slot_bounded(slot, zero, x, weights).value
    target = (-term).astype(np.float32)
    given = {"t": target, "x": x} | {f"adapter.s.{p}": v for p, v in weights.items()}
    found = slot_deviation(slot, [target, x, run_nodes(slot, 17, given)], weights)
    assert found.ratio <= 1
    assert found.error > 1e-3, "the value does not vanish"


def test_a_number_that_was_rounded_after_the_slot_read_it_may_have_underflowed() -> None:
    dtype = DTYPES["float16"]
    slot = replace(slot_of_case("ia3"), dtype="float16")
    scale = {"scale": np.full(WIDTH, 8, dtype)}
    read = np.full(shape(slot, WIDTH), 6.405e-6)  # between two numbers of float16
    output = (8 * read).astype(dtype)
    shown = read.astype(dtype)
    found = slot_deviation(slot, [shown, shown, output], scale)
    assert found.error > 0
    assert found.ratio <= 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_the_base_stays_so_and_the_rest_is_judged(value: float) -> None:
    slot = slot_of_case("biases")
    weights, tensors = _drawn(slot, 8), _tensors(slot, np.float32)
    tensors["t"][0, 1] = value
    given = tensors | {f"adapter.s.{p}": v for p, v in weights.items()}
    output = run_nodes(slot, 17, given)
    found = slot_deviation(slot, [tensors["t"], tensors["t"], output], weights)
    assert found.ratio <= 1
    assert (found.judged, found.unjudged) == (7 * WIDTH, WIDTH)
    output[0, 1] = 0
    assert slot_deviation(slot, [tensors["t"], tensors["t"], output], weights).ratio == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_by_itself_is_wrong(value: float) -> None:
    slot = slot_of_case("biases")
    weights, tensors = _drawn(slot, 8), _tensors(slot, np.float32)
    given = tensors | {f"adapter.s.{p}": v for p, v in weights.items()}
    output = run_nodes(slot, 17, given)
    output[1, 2, 3] = value
    found = slot_deviation(slot, [tensors["t"], tensors["t"], output], weights)
    assert found.ratio == np.inf


_REFERENCE = {
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Tanh": np.tanh,
    "Erf": lambda x: np.vectorize(math.erf)(x.astype(np.float64)),
    "Exp": np.exp,
    "Log": np.log,
}


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *((op, dtype) for op in _REFERENCE for dtype in ("float32", "float64") if op != "Erf"),
        ("Erf", "float32"),  # in float64 it has no kernel: slots compute it from exp
    ],
)
def test_onnx_runtimes_functions_are_as_exact_as_the_table_says(op: str, dtype: str) -> None:
    kind = ARITHMETIC[dtype]
    tiny = np.geomspace(1e-30, 1, 20_000)
    x = np.concatenate([np.linspace(-30, 30, 200_001), tiny, -tiny]).astype(kind.dtype)
    x = 1 + np.exp(-np.abs(x)) if op == "Log" else x  # where softplus needs it
    wanted = _REFERENCE[op](x.astype(np.longdouble))
    elem_type = helper.np_dtype_to_tensor_dtype(kind.dtype)
    ends = [helper.make_tensor_value_info(name, elem_type, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    off = np.abs(session(model).run(None, {"x": x})[0] - wanted)
    size = 1 if op == "Sigmoid" else np.abs(wanted)
    allowed = FUNCTION_UNITS[op.lower()] * kind.unit * size + kind.least
    assert (off <= allowed).all(), float((off / allowed).max())


def test_a_sum_that_cancels_has_the_bound_of_its_parts() -> None:
    """By hand: 1e4 - 1e4 + 1, three products, in float32."""
    kind = ARITHMETIC["float32"]
    x = exact(np.array([[1e4, -1e4, 1.0]]), kind)
    found = x.project(exact(np.ones((3, 1)), kind))
    gamma = 3 * 2.0**-24 / (1 - 3 * 2.0**-24)
    assert found.value[0, 0] == 1
    assert found.bound[0, 0] == pytest.approx(gamma * 20001 + 2.0**-24, 1e-6)
