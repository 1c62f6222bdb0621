"""Shared by the tests of the slot formula: cases, numpy written here, and runs of nodes."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from slot_models import session

from onnx_adapt.manifest import Slot
from onnx_adapt.slot import slot_nodes

WIDTH, SOURCE_WIDTH, RANK = 6, 5, 3
EPSILON = float(np.float32(1e-3))  # as an ONNX attribute holds it
OWN_EPSILON = float(np.float32(1e-5))
PLAIN = Slot(
    name="s",
    graph="main",
    node="layer",
    tensor="y",
    inner="t",
    output="y",
    source="t",
    width=WIDTH,
    source_width=WIDTH,
    dtype="float32",
    axis=-1,
    rank=0,
    activation="relu",
    parts=("down", "up"),
    plus="",
    norm="",
    norm_after="",
    module="",
    swappable=True,
    bottleneck=0,
)

ALL = (
    "down up down_bias up_bias scale gain norm_weight norm_bias gate gate_bias "
    "after_weight after_bias"
)

# Each part alone where it can be, then together. `t` is the target, `x` and `z` other tensors.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "down_bias": {"parts": "down up down_bias"},
    "up_bias": {"parts": "down up up_bias"},
    "biases": {"parts": "down up down_bias up_bias"},
    "lora": {"activation": "identity"},
    "ia3": {"parts": "scale"},
    "dora": {"parts": "down up scale", "activation": "identity"},
    "gain": {"parts": "down up gain"},
    "gain_of_biases": {"parts": "down up down_bias up_bias gain"},
    "own_norm": {"parts": "down up norm_weight"},
    "own_norm_bias": {"parts": "down up norm_weight norm_bias"},
    "base_norm": {"norm": "ln"},
    "base_and_own_norm": {"norm": "ln", "parts": "down up norm_weight norm_bias"},
    "gate": {"parts": "down up gate"},
    "gate_bias": {"parts": "down up gate gate_bias"},
    "gate_of_normed": {"norm": "ln", "parts": "down up gate gate_bias"},
    "after_term": {"parts": "down up after_weight", "norm_after": "term"},
    "after_term_bias": {"parts": "down up after_weight after_bias", "norm_after": "term"},
    "after_sum": {"parts": "down up after_weight switch", "norm_after": "sum"},
    "after_sum_bias": {
        "parts": "down up scale after_weight after_bias switch",
        "norm_after": "sum",
    },
    "skip": {"parts": "down up skip"},
    "skip_of_normed": {"norm": "ln", "parts": "down up scale skip"},
    "plus": {"plus": "z"},
    "plus_residual": {"plus": "z", "parts": "down up scale residual skip gate"},
    "plus_of_parallel_and_normed": {"plus": "z", "norm": "ln", "parts": "down up residual"},
    "coupling": {
        "parts": "f_down f_down_bias f_up f_up_bias g_down g_down_bias g_up g_up_bias",
        "activation": "tanh",
    },
    "parallel": {"source": "x", "source_width": SOURCE_WIDTH},
    "parallel_gate": {"source": "x", "source_width": SOURCE_WIDTH, "parts": "down up gate"},
    "everything": {
        "parts": f"{ALL} residual skip",
        "norm_after": "term",
        "norm": "ln",
        "plus": "z",
    },
    "everything_parallel": {
        "parts": f"{ALL} switch",
        "norm_after": "sum",
        "source": "x",
        "source_width": SOURCE_WIDTH,
        "activation": "tanh",
    },
}
CHANNEL_CASES = [
    name
    for name, case in CASES.items()
    if not {"norm", "norm_after", "plus"} & set(case)
    and not {"norm_weight", "gate", "skip", "f_up"} & set(case.get("parts", "").split())
]
NORMS = [name for name, case in CASES.items() if "norm" in str(case)]


def slot_of_case(case: str, **changes: Any) -> Slot:
    given = {**CASES[case], **changes}
    if "parts" in given:
        given["parts"] = tuple(given["parts"].split())
    return replace(PLAIN, **given)


def shape(slot: Slot, width: int) -> tuple[int, ...]:
    """(batch, tokens, width), or (batch, width, space...) of the slot's rank."""
    return (2, width, 4, 3, 2)[: slot.rank] if slot.axis == 1 else (2, 4, width)


def base_norm(dtype: Any, rng: np.random.Generator) -> tuple[onnx.NodeProto, list[Any]]:
    values = [rng.standard_normal(WIDTH).astype(dtype) for _ in range(2)]
    outputs = ["normed", "mean", "deviation"]
    node = helper.make_node(
        "LayerNormalization", ["sum", "g", "b"], outputs, "ln", epsilon=EPSILON
    )
    node.metadata_props.add(key="namespace", value="of the base")
    return node, values


def run_nodes(
    slot: Slot, opset: int, feeds: dict[str, np.ndarray], norm: onnx.NodeProto | None = None
) -> np.ndarray:
    """The slot's nodes as a model: checked, strictly inferred, run."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feeds.items()
    ]
    nodes = slot_nodes(slot, opset, norm)
    elem_type = inputs[0].type.tensor_type.elem_type
    output = helper.make_tensor_value_info("y", elem_type, feeds["t"].shape)
    graph = helper.make_graph(nodes, "g", inputs, [output])
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    if slot.dtype == "bfloat16":
        return ReferenceEvaluator(model).run(None, feeds)[0]
    return session(model).run(None, feeds)[0]


def _layer_norm(v: np.ndarray, weight: Any, bias: Any, epsilon: float) -> np.ndarray:
    mean = v.sum(-1, keepdims=True) / v.shape[-1]
    variance = ((v - mean) ** 2).sum(-1, keepdims=True) / v.shape[-1]
    return (v - mean) / (variance + epsilon) ** 0.5 * weight + bias


def formula(slot: Slot, f: dict[str, np.ndarray], norm: list[Any] | None) -> np.ndarray:
    """Design section 2 in plain numpy, the feature axis last."""
    wide = {k.removeprefix("adapter.s."): v.astype(np.float64) for k, v in f.items()}
    t, x = wide["t"], wide[slot.source]
    p = {part: wide[part] for part in slot.parts}
    act = {"relu": lambda v: np.where(v > 0, v, 0), "tanh": np.tanh, "identity": lambda v: v}
    if slot.axis == 1:
        t, x = np.moveaxis(t, 1, -1), np.moveaxis(x, 1, -1)
        p = {k: v.reshape(v.shape[:2] if k in ("down", "up") else -1) for k, v in p.items()}
        p |= {k: p[k].T for k in ("down", "up") if k in p}
    if "f_up" in p:
        return _coupling(act[slot.activation], t, p)
    total = t * p.get("scale", 1)
    if slot.plus:
        x = x + wide[slot.plus]
        total = total + wide[slot.plus] * p.get("residual", 0)
    if "down" in p:
        if norm is not None:
            g, b = (v.astype(np.float64) for v in norm)
            x = _layer_norm(x, g, b, EPSILON)
        total = total + (x * p["skip"] if "skip" in p else 0)
        h = x
        if "norm_weight" in p:
            h = _layer_norm(h, p["norm_weight"], p.get("norm_bias", 0), OWN_EPSILON)
        h = np.einsum("...i,ir->...r", h, p["down"]) + p.get("down_bias", 0)
        term = np.einsum("...r,rj->...j", act[slot.activation](h), p["up"])
        term = (term + p.get("up_bias", 0)) * p.get("gain", 1)
        if "gate" in p:
            opening = 1 / (1 + np.exp(-(x @ p["gate"] + p.get("gate_bias", 0))))
            term = term * opening.mean(axis=1, keepdims=True)
        if slot.norm_after == "term":
            term = _layer_norm(term, p["after_weight"], p.get("after_bias", 0), OWN_EPSILON)
        total = total + term
    if slot.norm_after == "sum":
        normed = _layer_norm(total, p["after_weight"], p.get("after_bias", 0), OWN_EPSILON)
        total = t + p["switch"] * (normed - t)
    return np.moveaxis(total, -1, 1) if slot.axis == 1 else total


def _coupling(act: Any, t: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """NICE (Dinh et al., 2014): each half moved by a network of the other."""
    half = t.shape[-1] // 2
    one, two = t[..., :half], t[..., half:]
    one = one + act(two @ p["f_down"] + p["f_down_bias"]) @ p["f_up"] + p["f_up_bias"]
    two = two + act(one @ p["g_down"] + p["g_down_bias"]) @ p["g_up"] + p["g_up_bias"]
    return np.concatenate([one, two], axis=-1)
