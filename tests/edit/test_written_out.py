"""Fused nodes that are written out for a slot: what they compute, by hand, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from sites_models import model
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.written_out import unfuse

RNG = np.random.default_rng(7)
W, V, B, S = (RNG.standard_normal(shape) for shape in ((4, 8), (8, 8), 8, (2, 3, 8)))
G, QKV, X = RNG.standard_normal(8), RNG.standard_normal(24), RNG.standard_normal((2, 3, 4))
DOWN, UP = RNG.standard_normal((8, 2)), RNG.standard_normal((2, 8))


def erf_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def layer_norm(x: np.ndarray, epsilon: float = 1e-12) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * G + G


def rms_norm(x: np.ndarray, epsilon: float = 1e-12) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * G


def heads(x: np.ndarray) -> np.ndarray:
    return x.reshape(2, 3, 2, 4).transpose(0, 2, 1, 3)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = heads(q) @ heads(k).transpose(0, 1, 3, 2) / 2
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = powers / powers.sum(-1, keepdims=True) @ heads(v)
    return mixed.transpose(0, 2, 1, 3).reshape(2, 3, 8)


def adapted(x: np.ndarray) -> np.ndarray:
    """What the slot of these tests makes of a layer's output."""
    return x + np.maximum(x @ DOWN, 0) @ UP


Q, K, C = np.split(QKV, 3)
"""The parts of an attention's bias, for queries, keys and values."""

ROWS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "BiasGelu": ("(h, b)", lambda h: erf_gelu(adapted(h + B))),
    "FastGelu": ("(h, b)", lambda h: tanh_gelu(adapted(h + B))),
    "BiasAdd": ("(h, b, s)", lambda h: adapted(h + B) + S),
    "BiasDropout": ("(h, b, s)", lambda h: adapted(h + B) + S),
    "BiasSplitGelu": (
        "(h, b)",
        lambda h: adapted(h + B)[..., :4] * erf_gelu(adapted(h + B)[..., 4:]),
    ),
    "SkipLayerNormalization": ("(h, s, g, g, b)", lambda h: layer_norm(adapted(h + B) + S)),
    "SkipLayerNormalization on the other side": (
        "<epsilon = 0.1>(s, h, g, g, b)",
        lambda h: layer_norm(adapted(h + B) + S, 0.1),
    ),
    "SkipSimplifiedLayerNormalization": (
        "<epsilon = 0.1>(h, s, g, b)",
        lambda h: rms_norm(adapted(h + B) + S, 0.1),
    ),
    "MultiHeadAttention of a query": (
        "<num_heads = 2>(h, s, s, qkv)",
        lambda h: attend(adapted(h + Q), S + K, S + C),
    ),
    "MultiHeadAttention of a key": (
        "<num_heads = 2>(s, h, s, qkv)",
        lambda h: attend(S + Q, adapted(h + K), S + C),
    ),
    "MultiHeadAttention of a value": (
        "<num_heads = 2>(s, s, h, qkv)",
        lambda h: attend(S + Q, S + K, adapted(h + C)),
    ),
}


def with_values(made: oa.Model) -> oa.Model:
    """Give the weights of a model the values of this module, instead of those of the text."""
    values = {"w": W, "v": V, "b": B, "g": G, "qkv": QKV}
    for tensor in made.proto.graph.initializer:
        if tensor.name in values:
            dtype = np.float32 if tensor.data_type == 1 else np.float16
            tensor.ClearField("float_data")
            tensor.ClearField("int32_data")
            tensor.raw_data = values[tensor.name].astype(dtype).tobytes()
    return made


def filled(made: oa.Model, after: str | list[str] = "fc") -> oa.Model:
    """Insert slots, and fill in the weights of this module."""
    inserted = oa.insert(made, after=after)
    weights = {slot.name: {"down": DOWN, "up": UP} for slot in oa.list_slots(inserted)}
    return oa.fill(inserted, oa.make_adapter(inserted, "hand", weights))


@pytest.mark.parametrize("row", ROWS)
def test_a_slot_behind_a_bias_computes_what_is_computed_by_hand(row: str) -> None:
    call, expected = ROWS[row]
    made = with_values(
        model(
            f"""g (float[n,3,4] x, float[n,3,8] s) => (float[n,3,O] y)
            {{ [fc] h = MatMul(x, w)  [act] y = com.microsoft.{row.split()[0]}{call} }}""",
            *("w 4 8", "b 8", "g 8", "qkv 24"),
            opset=18,
        )
    )
    feeds = {"x": X.astype(np.float32), "s": S.astype(np.float32)}
    (y,) = run(filled(made), feeds)
    truth = expected(X.astype(np.float32).astype(np.float64) @ W)
    np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-4)
    assert oa.remove(oa.insert(made, after="fc")).proto == made.proto
    assert oa.list_slots(oa.insert(made, after=["fc", "act"]))[1].tensor == "y"


def leaky(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, x * 0.25, x)


ACTIVE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "Relu": ("", lambda x: np.maximum(x, 0)),
    "Tanh": ("", np.tanh),
    "Sigmoid": ("", lambda x: 1 / (1 + np.exp(-x))),
    "LeakyRelu": ("alpha = 0.25", leaky),
    "HardSigmoid": ("alpha = 0.3, beta = 0.4", lambda x: np.clip(0.3 * x + 0.4, 0, 1)),
    "Elu": ("alpha = 0.5", lambda x: np.where(x < 0, 0.5 * (np.exp(x) - 1), x)),
}


@pytest.mark.parametrize("name", ACTIVE)
def test_a_slot_before_the_activation_of_a_gemm_computes_what_is_computed_by_hand(
    name: str,
) -> None:
    settings, function = ACTIVE[name]
    given = "".join(f", activation_{item.strip()}" for item in settings.split(",") if item)
    made = with_values(
        model(
            f"""g (float[n,4] x) => (float[n,8] y) {{ y = com.microsoft.FusedGemm
            <alpha = 2.0, activation = "{name}"{given}>(x, w, b) }}""",
            *("w 4 8", "b 8"),
        )
    )
    made.proto.graph.node[0].name = "/fc/Gemm"
    x = X.reshape(6, 4).astype(np.float32)
    (y,) = run(filled(made), {"x": x})
    truth = function(adapted(2 * x.astype(np.float64) @ W + B))
    np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-4)
    assert oa.remove(oa.insert(made, after="fc")).proto == made.proto


@pytest.mark.parametrize("opset", [10, 17])
@pytest.mark.parametrize(
    ("setting", "function"),
    [
        ("", lambda x: x),
        ('activation = "Relu",', lambda x: np.maximum(x, 0)),
        ('activation = "LeakyRelu", activation_params = [0.25],', leaky),
        ('activation = "Clip", activation_params = [-1.0, 2.0],', lambda x: np.clip(x, -1, 2)),
    ],
)
def test_a_slot_before_the_sum_in_a_convolution_computes_what_is_computed_by_hand(
    setting: str, function: Callable[[np.ndarray], np.ndarray], opset: int
) -> None:
    made = model(
        f"""g (float[n,4,5] x, float[n,8,5] z) => (float[n,8,5] y)
        {{ y = com.microsoft.FusedConv<{setting} kernel_shape = [1]>(x, w, b, z) }}""",
        *("w 8 4 1", "b 8"),
        opset=opset,
    )
    for tensor, value in zip(made.proto.graph.initializer, (W.T, B), strict=True):
        tensor.ClearField("float_data")
        tensor.raw_data = np.ascontiguousarray(value, np.float32).tobytes()
    made.proto.graph.node[0].name = "/fc/Conv"
    inserted = oa.insert(made, after="fc", axis=1)
    (slot,) = oa.list_slots(inserted)
    feeds = {"x": RNG.standard_normal((2, 4, 5)), "z": RNG.standard_normal((2, 8, 5))}
    feeds = {key: value.astype(np.float32) for key, value in feeds.items()}
    weights = {slot.weight("down"): DOWN.T[..., None], slot.weight("up"): UP.T[..., None]}
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    (y,) = run(inserted, {**feeds, **weights})
    made_by_conv = feeds["x"].astype(np.float64).transpose(0, 2, 1) @ W + B
    truth = function(adapted(made_by_conv).transpose(0, 2, 1) + feeds["z"])
    np.testing.assert_allclose(y, truth, rtol=1e-4, atol=1e-4)
    assert oa.remove(inserted).proto == made.proto


@pytest.mark.parametrize("opset", [14, 17, 18, 23])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_a_residual_sum_is_taken_out_in_every_opset(op: str, dtype: str, opset: int) -> None:
    """In half precision a square of more than 255 is infinite; what normalises has none."""
    weights = "g, g, b" if op == "SkipLayerNormalization" else "g, b"
    base = with_values(
        model(
            f"""g ({dtype}[n,3,4] x, {dtype}[n,3,8] s) => ({dtype}[n,3,8] y)
            {{ h = MatMul(x, w)  y = com.microsoft.{op}<epsilon = 0.1>(h, s, {weights}) }}""",
            *(f"{name} {dtype}" for name in ("w 4 8", "b 8", "g 8")),
            opset=opset,
        )
    )
    written, (record,) = unfuse(base, [FusedPlace("main", "y", "h", residual=True)])
    assert record.residual
    kind = np.float32 if dtype == "float" else np.float16
    feeds = {"x": (300 * X).astype(kind), "s": S.astype(kind)}
    (y,) = run(written, feeds)
    total = feeds["x"].astype(np.float64) @ W + B + feeds["s"]
    truth = layer_norm(total, 0.1) if "Simplified" not in op else rms_norm(total, 0.1)
    tolerance = 1e-4 if dtype == "float" else 2e-2
    np.testing.assert_allclose(y, truth, rtol=tolerance, atol=tolerance)
    onnx.checker.check_model(written.proto)
