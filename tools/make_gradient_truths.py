"""Make the gradients that the rules of `graph/gradients/` are held against, with PyTorch.

Each case is one ONNX node with its inputs, the same computation in PyTorch, and what
PyTorch's autograd gives in float64 for a random gradient of the outputs. All is written into
one file, `tests/graph/gradients/truths.npz`. Needs PyTorch, which the tests do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

FILE = Path(__file__).parents[1] / "tests/graph/gradients/truths.npz"
RNG = np.random.default_rng(7)
MS = "com.microsoft"
CASES: list[dict[str, Any]] = []
FLOATS: list[np.ndarray] = []
COUNTS: list[np.ndarray] = []

Tensor = torch.Tensor


def n(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal numbers."""
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def p(*shape: int) -> np.ndarray:
    """Positive numbers."""
    return np.abs(n(*shape)) + np.float32(0.3)


def a(*shape: int) -> np.ndarray:
    """Numbers of which no two are close, none near 0, 1 or 3."""
    count = math.prod(shape)
    order = RNG.permutation(count) - count / 2 + 0.37
    return (order.reshape(shape) / 3).astype(np.float32)


def i(*values: int) -> np.ndarray:
    """Integers on one axis."""
    return np.array(values, np.int64)


def _stored(value: np.ndarray, of: list[np.ndarray]) -> list[Any]:
    start = sum(item.size for item in of)
    of.append(value.reshape(-1))
    return [start, list(value.shape), value.dtype.name]


def case(
    op: str,
    function: Callable[..., Any],
    inputs: Sequence[np.ndarray | None],
    *,
    kind: str = "",
    domain: str = "",
    opset: int = 21,
    wrt: Sequence[int] | None = None,
    outputs: int = 1,
    shown: Sequence[int] | None = None,
    text: str = "",
    **attributes: Any,
) -> None:
    """Compute one case.

    Args:
        op: The operator.
        function: The same in PyTorch, of all inputs that are given.
        inputs: Floats are differentiated for, others are constants; None is left out.
        kind: What tells it from other cases of the operator.
        domain: Domain of the operator.
        opset: Version of the default operator set.
        wrt: The inputs to differentiate for, if not all floats.
        outputs: How many outputs the node has.
        shown: The outputs that the function gives, if not all.
        text: Nodes in ONNX's text format that are to stand for the one node.
        attributes: Attributes of the node.
    """
    floats = [k for k, x in enumerate(inputs) if x is not None and x.dtype == np.float32]
    chosen = floats if wrt is None else list(wrt)
    tensors = [
        None
        if x is None
        else torch.tensor(
            x.astype(np.float64) if k in floats else x, requires_grad=k in chosen
        )
        for k, x in enumerate(inputs)
    ]
    made = function(*tensors)
    results = list(made) if isinstance(made, tuple) else [made]
    given = [n(*result.shape) for result in results]
    total = sum(
        (result * torch.tensor(grad.astype(np.float64))).sum()
        for result, grad in zip(results, given, strict=True)
    )
    wanted = [tensors[k] for k in chosen]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    CASES.append(
        {
            "name": f"{op} {kind}".strip(),
            "op": op,
            "domain": domain,
            "opset": opset,
            "attributes": attributes,
            "text": text,
            "inputs": [
                None if x is None else _stored(x, FLOATS if k in floats else COUNTS)
                for k, x in enumerate(inputs)
            ],
            "wrt": chosen,
            "outputs": outputs,
            "shown": list(shown if shown is not None else range(len(results))),
            "given": [_stored(grad, FLOATS) for grad in given],
            "grads": [
                _stored(
                    np.zeros(tuple(t.shape), np.float32)
                    if grad is None
                    else grad.numpy().astype(np.float32),
                    FLOATS,
                )
                for t, grad in zip(wanted, grads, strict=True)
            ],
        }
    )


def pointwise() -> None:
    """Operators of one number."""
    plain = {
        "Neg": torch.neg,
        "Exp": torch.exp,
        "Sin": torch.sin,
        "Cos": torch.cos,
        "Erf": torch.erf,
        "Sigmoid": torch.sigmoid,
        "Tanh": torch.tanh,
        "Tan": torch.tan,
        "Sinh": torch.sinh,
        "Cosh": torch.cosh,
        "Atan": torch.atan,
        "Asinh": torch.asinh,
        "Softplus": F.softplus,
        "Softsign": F.softsign,
        "Mish": F.mish,
        "Gelu": F.gelu,
        "Identity": lambda x: x.clone(),
    }
    for op, function in plain.items():
        case(op, function, [n(2, 3)])
    apart = {"Abs": torch.abs, "Relu": F.relu, "Celu": F.celu, "Elu": F.elu, "Selu": F.selu}
    for op, function in apart.items():
        case(op, function, [a(3, 4)])
    for op, function in {
        "Reciprocal": torch.reciprocal,
        "Log": torch.log,
        "Sqrt": torch.sqrt,
    }.items():
        case(op, function, [p(3, 2)])
    for op, function in {"Asin": torch.asin, "Acos": torch.acos}.items():
        case(op, function, [np.array([-0.5, 0.1, 0.7], np.float32)])
    case(
        "Gelu",
        lambda x: F.gelu(x, approximate="tanh"),
        [n(3, 4)],
        kind="tanh",
        approximate="tanh",
    )
    case("LeakyRelu", lambda x: F.leaky_relu(x, 0.1), [a(3, 4)], alpha=0.1)
    case("Elu", lambda x: F.elu(x, 1.5), [a(3, 4)], kind="alpha", alpha=1.5)
    case("Celu", lambda x: F.celu(x, 1.5), [a(3, 4)], kind="alpha", alpha=1.5)
    case("HardSigmoid", F.hardsigmoid, [a(4, 4)], alpha=1 / 6, beta=0.5)
    case("HardSwish", F.hardswish, [a(4, 5)])
    case("ThresholdedRelu", lambda x: F.threshold(x, 0.5, 0.0), [a(4, 4)], alpha=0.5)
    low, high = (np.array(value, np.float32) for value in (-1.0, 1.2))
    case("Clip", lambda x, *_: x.clamp(-1.0, 1.2), [a(4, 4), low, high], wrt=[0])
    case("Dropout", lambda x: x.clone(), [n(3, 4)])
    case("Swish", lambda x: x * torch.sigmoid(1.3 * x), [n(3, 4)], opset=24, alpha=1.3)
    case("QuickGelu", lambda x: x * torch.sigmoid(1.702 * x), [n(3, 4)], domain=MS)
    case("BiasGelu", lambda x, b: F.gelu(x + b), [n(2, 3, 4), n(4)], domain=MS)
    case(
        "FastGelu",
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        [n(2, 3, 4), n(4)],
        domain=MS,
    )
    case(
        "FastGelu", lambda x: F.gelu(x, approximate="tanh"), [n(2, 4)], kind="plain", domain=MS
    )
    case("Cast", lambda x: x.clone(), [n(2, 3)], to=1)
    case("CastLike", lambda x, _: x.clone(), [n(2, 3), n(1)], wrt=[0])


def binary() -> None:
    """Operators of several tensors, broadcast in several ways."""
    x, y = n(2, 3, 4), n(3, 1)
    for op, function in {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul}.items():
        case(op, function, [x, y])
        case(op, function, [n(4), x], kind="the other way")
        case(op, function, [n(), x], kind="number")
    case("Div", torch.div, [x, p(3, 1)])
    case("Div", torch.div, [n(), p(2, 3)], kind="number")
    for op, function in {"Max": torch.maximum, "Min": torch.minimum}.items():
        case(op, function, [x, y])
    case("Pow", torch.pow, [p(2, 3), n(3)])
    case("Pow", lambda x, _: x**3, [n(2, 3), np.array(3, np.int64)], kind="cube")
    case("Sum", lambda *t: t[0] + t[1] + t[2], [x, y, n(4)])
    chosen = np.array([[True, False, True, True]])
    case("Where", torch.where, [chosen, x, y])
    case(
        "PRelu",
        lambda x, s: torch.where(x > 0, x, s * x),
        [a(2, 3, 4), p(3, 1)],
    )


def products() -> None:
    """Matrix products."""
    for kind, left, right in (
        ("", (3, 4), (4, 2)),
        ("stack by matrix", (2, 3, 4), (4, 5)),
        ("broadcast", (2, 1, 3, 4), (5, 4, 2)),
        ("vector", (2, 3, 4), (4,)),
        ("of vector", (4,), (2, 4, 3)),
        ("vectors", (4,), (4,)),
    ):
        case("MatMul", torch.matmul, [n(*left), n(*right)], kind=kind)
    for flip in (0, 1):
        case(
            "Gemm",
            lambda x, y, c, flip=flip: (
                0.5 * (x.T if flip else x) @ (y.T if flip else y) + 2 * c
            ),
            [n(4, 3) if flip else n(3, 4), n(5, 4) if flip else n(4, 5), n(5)],
            kind=f"flip {flip}",
            transA=flip,
            transB=flip,
            alpha=0.5,
            beta=2.0,
        )
    case(
        "FusedMatMul",
        lambda x, y: 0.5 * x.mT @ y.mT,
        [n(2, 4, 3), n(2, 5, 4)],
        domain=MS,
        transA=1,
        transB=1,
        alpha=0.5,
    )
    for equation, shapes in {
        "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
        "bij,jk->ik": ((2, 3, 4), (4, 5)),
        "ij,jk,k->i": ((2, 3), (3, 4), (4,)),
    }.items():
        case(
            "Einsum",
            lambda *t, e=equation: torch.einsum(e, *t),
            [n(*shape) for shape in shapes],
            kind=equation,
            equation=equation,
        )


def reductions() -> None:
    """Reductions and what sums along axes."""
    plain = {
        "ReduceSum": lambda x, d, k: x.sum(d, k),
        "ReduceMean": lambda x, d, k: x.mean(d, k),
        "ReduceMax": lambda x, d, k: x.amax(d, k),
        "ReduceMin": lambda x, d, k: x.amin(d, k),
        "ReduceLogSumExp": lambda x, d, k: x.logsumexp(d, k),
        "ReduceSumSquare": lambda x, d, k: (x * x).sum(d, k),
        "ReduceL1": lambda x, d, k: x.abs().sum(d, k),
        "ReduceL2": lambda x, d, k: (x * x).sum(d, k).sqrt(),
        "ReduceLogSum": lambda x, d, k: x.sum(d, k).log(),
    }
    for op, function in plain.items():
        for kind, axes, keep in (("one", (1,), 0), ("two", (0, -1), 1)):
            case(
                op,
                lambda x, _, f=function, d=axes, k=bool(keep): f(x, d, k),
                [p(2, 3, 4), i(*axes)],
                kind=kind,
                keepdims=keep,
            )
    case("Softmax", lambda x: x.softmax(-1), [n(2, 3, 4)])
    case("Softmax", lambda x: x.softmax(1), [n(2, 3, 4)], kind="axis", axis=1)
    case("LogSoftmax", lambda x: x.log_softmax(-1), [n(2, 3)])
    case("CumSum", lambda x, _: x.cumsum(1), [n(3, 4), np.array(1)])
    case("TopK", lambda x, _: x.topk(2, 1)[0], [a(3, 5), i(2)], axis=1, outputs=2)


def norms() -> None:
    """Normalisations."""
    layer, rms = F.layer_norm, F.rms_norm
    case("LayerNormalization", lambda x, w, b: layer(x, (4,), w, b), [n(2, 3, 4), n(4), n(4)])
    case(
        "LayerNormalization",
        lambda x, w: layer(x, (3, 4), w, None, 1e-3),
        [n(2, 3, 4), n(3, 4)],
        kind="two axes",
        axis=1,
        epsilon=1e-3,
    )
    case("RMSNormalization", lambda x, w: rms(x, (4,), w, 1e-5), [n(2, 3, 4), n(4)], opset=23)
    case(
        "SimplifiedLayerNormalization",
        lambda x, w: rms(x, (4,), w, 1e-5),
        [n(2, 3, 4), n(4)],
        epsilon=1e-5,
    )

    def skip(norm: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda x, s, *rest: (norm(x + s + rest[-1], *rest[:-1]), x + s + rest[-1])

    case(
        "SkipLayerNormalization",
        skip(lambda t, w, b: layer(t, (4,), w, b, 1e-5)),
        [n(2, 3, 4), n(2, 3, 4), n(4), n(4), n(4)],
        domain=MS,
        outputs=4,
        shown=[0, 3],
        epsilon=1e-5,
    )
    case(
        "SkipSimplifiedLayerNormalization",
        skip(lambda t, w: rms(t, (4,), w, 1e-5)),
        [n(2, 3, 4), n(2, 3, 4), n(4), n(4)],
        domain=MS,
        outputs=4,
        shown=[0, 3],
        epsilon=1e-5,
    )
    case(
        "BatchNormalization",
        lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach(), w, b),
        [n(2, 3, 4), n(3), n(3), n(3), p(3)],
        wrt=[0, 1, 2],
    )
    case(
        "InstanceNormalization",
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        [n(2, 3, 4, 2), n(3), n(3)],
    )
    case("LpNormalization", lambda x: F.normalize(x, dim=1), [n(2, 3, 4)], axis=1)
    case(
        "GroupNormalization",
        lambda x, w, b: F.group_norm(x, 2, w, b),
        [n(2, 4, 3), n(4), n(4)],
        num_groups=2,
    )


def moving() -> None:
    """Operators that move numbers."""
    case("Reshape", lambda x, _: x.reshape(3, 4), [n(2, 6), i(3, -1)])
    case("Flatten", lambda x: x.flatten(1), [n(2, 3, 4)])
    case("Squeeze", lambda x, _: x.squeeze(1), [n(2, 1, 3), i(1)])
    case("Unsqueeze", lambda x, _: x[None, :, None], [n(2, 3), i(0, 2)])
    case("Transpose", lambda x: x.permute(2, 0, 1), [n(2, 3, 4)], perm=[2, 0, 1])
    case("Expand", lambda x, _: x.expand(2, 3, 4), [n(3, 1), i(2, 3, 4)])
    case("Tile", lambda x, _: x.repeat(2, 3), [n(2, 3), i(2, 3)])
    case("Concat", lambda *t: torch.cat(t, -1), [n(2, 3), n(2, 1), n(2, 2)], axis=-1)
    case("Split", lambda x, _: x.split([1, 5], 1), [n(2, 6), i(1, 5)], axis=1, outputs=2)
    case("Pad", lambda x, _: F.pad(x, (1, 0, 0, 2)), [n(2, 3), i(0, 1, 2, 0)])
    case("Gather", lambda x, k: x[k], [n(5, 3), np.array([[0, 4], [4, 4]])])
    case("Gather", lambda x, k: x[:, k], [n(2, 5, 3), i(3, 3, 0)], kind="axis", axis=1)
    where = np.array([[0, 2], [1, 1], [3, 0]])
    case("GatherElements", lambda x, k: x.gather(1, k), [n(3, 4), where], axis=1)
    pairs = np.array([[0, 1], [0, 1], [2, 3]])
    case("GatherND", lambda x, k: x[k[:, 0], k[:, 1]], [n(3, 4), pairs])
    case(
        "ScatterND",
        lambda x, k, u: x.index_copy(0, k[:, 0], u),
        [n(4, 3), np.array([[0], [2]]), n(2, 3)],
    )
    case(
        "ScatterElements",
        lambda x, k, u: x.scatter(1, k, u),
        [n(2, 4), np.array([[0, 2], [1, 3]]), n(2, 2)],
        axis=1,
    )
    case(
        "ScatterElements",
        lambda x, k, u: x.scatter_add(1, k, u),
        [n(2, 4), np.array([[0, 2], [1, 1]]), n(2, 2)],
        kind="add",
        axis=1,
        reduction="add",
    )
    case("Slice", lambda x, *_: x[1:3, 0:4], [n(4, 5), i(1, 0), i(3, 4), i(0, 1)])
    case(
        "Slice",
        lambda x, *_: x[:, 1::3],
        [n(4, 7), i(1), i(9), i(1), i(3)],
        kind="steps",
    )
    case("Trilu", lambda x, _: x.tril(1), [n(3, 4), np.array(1)], upper=0)
    case(
        "ReverseSequence",
        lambda x, _: torch.stack(
            [x[:, 0].flip(0), torch.cat([x[:2, 1].flip(0), x[2:, 1]])], 1
        ),
        [n(3, 2, 2), i(3, 2)],
        batch_axis=1,
        time_axis=0,
    )
    case("SpaceToDepth", lambda x: _dcr(x, 2), [n(1, 2, 4, 6)], blocksize=2)
    case(
        "DepthToSpace",
        lambda x: F.pixel_shuffle(x, 2),
        [n(1, 8, 2, 3)],
        kind="CRD",
        blocksize=2,
        mode="CRD",
    )
    case(
        "DepthToSpace",
        lambda x: x.reshape(1, 2, 2, 2, 2, 3).permute(0, 3, 4, 1, 5, 2).reshape(1, 2, 4, 6),
        [n(1, 8, 2, 3)],
        blocksize=2,
    )


def _dcr(x: Tensor, block: int) -> Tensor:
    """SpaceToDepth: `(block, block, channels)` on axis 1."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // block, block, width // block, block)
    return parts.permute(0, 3, 5, 1, 2, 4).reshape(
        batch, channels * block * block, height // block, width // block
    )


def convolutions() -> None:
    """Convolutions, pooling and resizing."""
    case(
        "Conv",
        lambda x, w, b: F.conv1d(x, w, b, padding=1),
        [n(2, 3, 5), n(4, 3, 3), n(4)],
        pads=[1, 1],
    )
    case(
        "Conv",
        lambda x, w: F.conv2d(F.pad(x, (0, 1, 1, 0)), w, stride=(2, 3)),
        [n(1, 2, 6, 7), n(3, 2, 3, 2)],
        kind="strides",
        strides=[2, 3],
        pads=[1, 0, 0, 1],
    )
    case(
        "Conv",
        lambda x, w: F.conv1d(x, w, stride=2, groups=2),
        [n(1, 4, 5), n(6, 2, 3)],
        kind="groups",
        wrt=[0],
        group=2,
        strides=[2],
    )
    case(
        "ConvTranspose",
        lambda x, w: F.conv_transpose1d(x, w, stride=2, padding=1, output_padding=1),
        [n(1, 2, 4), n(2, 3, 3)],
        wrt=[0],
        strides=[2],
        pads=[1, 1],
        output_padding=[1],
    )
    case(
        "MaxPool",
        lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0)),
        [a(1, 2, 6, 5)],
        kernel_shape=[3, 2],
        strides=[2, 1],
        pads=[1, 0, 1, 0],
    )
    case(
        "AveragePool",
        lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 0), count_include_pad=False),
        [n(1, 2, 6, 5)],
        kernel_shape=[3, 2],
        strides=[2, 2],
        pads=[1, 0, 1, 0],
    )
    case("GlobalAveragePool", lambda x: x.mean((2, 3), True), [n(2, 3, 4, 2)])
    case("GlobalMaxPool", lambda x: x.amax((2, 3), True), [a(2, 3, 4, 2)])
    asymmetric = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    _resize("nearest", "nearest", {}, asymmetric)
    _resize("bilinear", "linear", {"align_corners": False}, {})
    _resize("bicubic", "cubic", {"align_corners": False}, {"cubic_coeff_a": -0.75})


def _resize(mode: str, name: str, given: dict[str, Any], how: dict[str, Any]) -> None:
    case(
        "Resize",
        lambda x, *_: F.interpolate(x, (6, 5), mode=mode, **given),
        [n(1, 2, 3, 4), None, None, i(1, 2, 6, 5)],
        kind=mode,
        mode=name,
        **how,
    )


# Quantised layers: rounding is passed straight through, so PyTorch computes with the numbers
# that the integers stand for.


def _bytes(*shape: int, low: int = 0, high: int = 256) -> np.ndarray:
    return RNG.integers(low, high, shape).astype(np.uint8)


def quantised() -> None:
    """Quantised layers."""
    scale, zero = np.array(0.1, np.float32), np.array(128, np.uint8)
    case(
        "QuantizeLinear",  # 30 and -40 are outside of what 8 bits of 0.1 reach
        lambda x, *_: torch.where(x.abs() < 12.7, x / 0.1, 0.0 * x),
        [np.array([[0.31, -1.52, 30.0], [2.0, 12.6, -40.0]], np.float32), scale, zero],
        wrt=[0],
        text="q = QuantizeLinear (x0, x1, x2) y0 = Cast <to = 1> (q)",
    )
    x = n(2, 3, 8)
    weight = _bytes(8, 5)
    floats = torch.tensor(weight.astype(np.float64)) - 128
    case(
        "DynamicQuantizeMatMul",
        lambda x, w, s, z: x @ (floats * s),
        [x, weight, scale, zero],
        domain=MS,
        wrt=[0],
    )
    for bits in (4, 8):
        _n_bits(x[..., :8], bits)
    _bnb4()
    relu = {"activation": "Relu"}
    case(
        "FusedGemm",
        lambda x, w, b: F.relu(x @ w + b),
        [n(3, 4), n(4, 5), n(5)],
        domain=MS,
        **relu,
    )
    case(
        "FusedConv",
        lambda x, w, b, z: F.relu(F.conv1d(x, w, b) + z),
        [n(2, 3, 5), n(4, 3, 3), n(4), n(2, 4, 3)],
        domain=MS,
        **relu,
    )
    case(
        "GemmFastGelu",
        lambda x, w, b: F.gelu(x @ w + b, approximate="tanh"),
        [n(2, 3, 4), n(4, 5), n(5)],
        domain=MS,
    )
    case("BiasAdd", lambda x, b, s: x + b + s, [n(2, 3, 4), n(4), n(2, 3, 4)], domain=MS)
    case(
        "BiasSplitGelu",
        lambda x, b: (x + b)[..., :4] * F.gelu((x + b)[..., 4:]),
        [n(2, 3, 8), n(8)],
        domain=MS,
    )


def _n_bits(x: np.ndarray, bits: int) -> None:
    """MatMulNBits with one block of 16 for each of 3 rows, `K` = 8."""
    rows, width, block = 3, 8, 16
    packed = _bytes(rows, 1, block * bits // 8)
    scales = p(rows)
    numbers = packed.reshape(rows, -1)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], -1).reshape(rows, -1)
    plain = (numbers[:, :width].astype(np.float64) - (1 << (bits - 1))) * scales[:, None]
    case(
        "MatMulNBits",
        lambda x, *_: x @ torch.tensor(plain).T,
        [x, packed, scales],
        kind=f"{bits}",
        domain=MS,
        wrt=[0],
        K=width,
        N=rows,
        bits=bits,
        block_size=block,
    )


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The numbers of NF4 (Dettmers et al., 2023), as bitsandbytes has them."""


def _bnb4() -> None:
    rows, width, block = 4, 8, 16
    packed, scales = _bytes(rows * width // 2), p(rows * width // block)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, block)
    plain = (np.array(_NF4)[codes] * scales[:, None]).reshape(rows, width)
    case(
        "MatMulBnb4",
        lambda x, *_: x @ torch.tensor(plain).T,
        [n(2, 3, width), packed, scales],
        domain=MS,
        wrt=[0],
        K=width,
        N=rows,
        block_size=block,
        quant_type=1,
    )


def recurrent() -> None:
    """LSTM, GRU and RNN; ONNX has their gates in another order than PyTorch."""
    # Where PyTorch's gates are among ONNX's: i, f, g, o in i, o, f, c; r, z, n in z, r, h.
    orders = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
    steps, batch, width, size = 3, 2, 4, 3
    for op, order in orders.items():
        for kind in ("forward", "reverse", "bidirectional"):
            ways = 2 if kind == "bidirectional" else 1
            rows = len(order) * size
            inputs = [n(steps, batch, width)]
            inputs += [n(ways, rows, width, scale=0.5), n(ways, rows, size, scale=0.5)]
            inputs += [n(ways, 2 * rows, scale=0.5), None, n(ways, batch, size)]
            inputs += [n(ways, batch, size)] if op == "LSTM" else []
            more = {"linear_before_reset": 1} if op == "GRU" else {}
            case(
                op,
                lambda x, w, r, b, _, h, c=None, op=op, order=order, kind=kind: _recurrent(
                    op, order, kind, x, w, r, b, h, c
                ),
                inputs,
                kind=kind,
                outputs=3 if op == "LSTM" else 2,
                direction=kind,
                hidden_size=size,
                **more,
            )


def _recurrent(
    op: str,
    order: Sequence[int],
    kind: str,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor,
    h: Tensor,
    c: Tensor | None,
) -> tuple[Tensor, ...]:
    """What PyTorch computes, a direction at a time, with the gates in PyTorch's order."""
    size = h.shape[-1]

    def gates(t: Tensor) -> Tensor:
        """Gates in ONNX's order, in PyTorch's."""
        parts = t.split(size)
        return torch.cat([parts[k] for k in order])

    shown, last, cells = [], [], []
    for way in range(w.shape[0]):
        turn = kind == "reverse" or way == 1
        given = x.flip(0) if turn else x
        wb, rb = b[way].split(b.shape[1] // 2)
        module = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU, "RNN": torch.nn.RNN}[op](
            x.shape[2], size
        ).double()
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        values = dict(zip(names, map(gates, (w[way], r[way], wb, rb)), strict=True))
        state = (h[way : way + 1], c[way : way + 1]) if c is not None else h[way : way + 1]
        made, end = torch.func.functional_call(module, values, (given, state))
        shown.append(made.flip(0) if turn else made)
        last.append(end[0] if c is not None else end)
        cells += [end[1]] if c is not None else []
    results = [torch.stack(shown, 1), torch.cat(last)]
    return (*results, torch.cat(cells)) if c is not None else tuple(results)


def _heads(t: Tensor, count: int) -> Tensor:
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


def _merged(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


def attentions() -> None:
    """Fused attentions against PyTorch's own."""
    attend = F.scaled_dot_product_attention
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)

    def packed(x: Tensor, w: Tensor, b: Tensor, *rest: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (_heads(part, 2) for part in (x @ w + b).chunk(3, -1))
        seen = rest[0].bool()[:, None, None] if rest else None
        return _merged(attend(q, k, v, attn_mask=seen, is_causal=causal))

    inputs = [n(2, 4, 6), n(6, 12), n(12)]
    case("Attention", packed, [*inputs, mask], domain=MS, num_heads=2, mask_filter_value=-1e9)
    case(
        "Attention",
        lambda *t: packed(*t, causal=True),
        inputs,
        kind="causal",
        domain=MS,
        num_heads=2,
        unidirectional=1,
    )
    case(
        "MultiHeadAttention",
        lambda q, k, v, b: _merged(
            attend(*(_heads(t + c, 2) for t, c in zip((q, k, v), b.chunk(3), strict=True)))
        ),
        [n(2, 4, 6), n(2, 5, 6), n(2, 5, 6), n(18)],
        domain=MS,
        num_heads=2,
    )
    case(
        "Attention",
        lambda q, k, v: attend(q, k, v, is_causal=True, enable_gqa=True),
        [n(2, 4, 3, 6), n(2, 2, 3, 6), n(2, 2, 3, 6)],
        kind="of ONNX",
        opset=23,
        is_causal=1,
    )
    _grouped()
    cos, sin = (
        f(np.outer(np.arange(8), [1.0, 0.1])).astype(np.float32) for f in (np.cos, np.sin)
    )
    places = np.array([[0, 1, 2], [1, 3, 4]])
    case(
        "RotaryEmbedding",
        lambda x, k, c, s: _merged(_turned(_heads(x, 2), c[k], s[k])),
        [n(2, 3, 8), places, cos, sin],
        domain=MS,
        wrt=[0],
        num_heads=2,
    )


def _angles() -> list[np.ndarray]:
    """The cosines and sines of 8 positions, for heads of 4 features."""
    angles = np.outer(np.arange(8), [1.0, 0.1])
    return [function(angles).astype(np.float32) for function in (np.cos, np.sin)]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as Llama has them in transformers: `x * cos + rotate_half(x) * sin`."""
    first, second = x.chunk(2, -1)
    whole = torch.cat([-second, first], -1)
    cos, sin = (torch.cat([t, t], -1)[:, None] for t in (cos, sin))
    return x * cos + whole * sin


def _grouped() -> None:
    """GroupQueryAttention without a past, and with 2 positions of one in a window."""
    cos, sin = (
        f(np.outer(np.arange(8), [1.0, 0.1])).astype(np.float32) for f in (np.cos, np.sin)
    )
    for past in (0, 2):
        length = 3
        inputs: list[np.ndarray | None] = [n(1, length, 16), n(1, length, 8), n(1, length, 8)]
        inputs += [n(1, 2, past, 4), n(1, 2, past, 4)]
        inputs += [np.array([past + length - 1], np.int32), np.array(past + length, np.int32)]
        inputs += [cos, sin]

        def grouped(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            pk: Tensor,
            pv: Tensor,
            _: Any,
            t: Any,
            c: Tensor,
            s: Tensor,
        ) -> Tensor:
            before = pk.shape[2]
            place = torch.arange(before, before + q.shape[1])
            cosines, sines = c[place][None], s[place][None]
            q, k, v = _heads(q, 4), _heads(k, 2), _heads(v, 2)
            q, k = _turned(q, cosines, sines), _turned(k, cosines, sines)
            k, v = torch.cat([pk, k], 2), torch.cat([pv, v], 2)
            keys = torch.arange(k.shape[2])
            seen = place[:, None] >= keys
            if before:
                seen &= place[:, None] - keys < 3
            return _merged(
                F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            )

        case(
            "GroupQueryAttention",
            grouped,
            inputs,
            kind=f"past {past}",
            domain=MS,
            wrt=[0, 1, 2],
            outputs=3,
            shown=[0],
            num_heads=4,
            kv_num_heads=2,
            do_rotary=1,
            **({"local_window_size": 3} if past else {}),
        )


# Several nodes. What is rounded on the way counts as it is: PyTorch's `fake_quantize` passes
# gradients straight through as well.


def _rounded(x: Tensor, scale: float, zero: int) -> Tensor:
    made = torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255)
    return made.double()


def several() -> None:
    """Small graphs of operators that do not stand alone."""
    weight = _bytes(4, 5)
    floats = (torch.tensor(weight.astype(np.float64)) - 128) * 0.02
    constants = (
        "zero = Constant <value = uint8 {128}> () unit = Constant <value = float {0.02}> ()"
    )
    case(
        "DynamicQuantizeLinear",
        lambda x, w: x @ floats,
        [n(2, 3, 4), weight],
        text=constants
        + """
        q, s, z = DynamicQuantizeLinear (x0)
        i = MatMulInteger (q, x1, z, zero)
        f = Cast <to = 1> (i)
        t = Mul (s, unit)
        y0 = Mul (f, t)""",
    )
    kernel = _bytes(3, 2, 3)
    taps = (torch.tensor(kernel.astype(np.float64)) - 128) * 0.02
    case(
        "ConvInteger",
        lambda x, w: F.conv1d(x, taps, padding=1),
        [n(2, 2, 5), kernel],
        text=constants
        + """
        q, s, z = DynamicQuantizeLinear (x0)
        i = ConvInteger <pads = [1, 1]> (q, x1, z, zero)
        f = Cast <to = 1> (i)
        t = Mul (s, unit)
        y0 = Mul (f, t)""",
    )
    quantise = constants + " wide = Constant <value = float {0.1}> () "
    quantise += " q = QuantizeLinear (x0, wide, zero) "
    after = " y0 = DequantizeLinear (r, wide, zero) "
    bias = RNG.integers(-500, 500, 5).astype(np.int32)
    biases = torch.tensor(bias.astype(np.float64)) * 0.002
    lines = {
        "QLinearMatMul": (
            "r = QLinearMatMul (q, wide, zero, x1, unit, zero, wide, zero)",
            lambda x, w: _rounded(x, 0.1, 128) @ floats,
            [n(3, 4), weight],
        ),
        "QGemm": (
            "r = com.microsoft.QGemm (q, wide, zero, x1, unit, zero, x2, wide, zero)",
            lambda x, w, b: _rounded(x, 0.1, 128) @ floats + biases,
            [n(3, 4), weight, bias],
        ),
        "QLinearConv": (
            "r = QLinearConv <pads = [1, 1]> (q, wide, zero, x1, unit, zero, wide, zero)",
            lambda x, w: F.conv1d(_rounded(x, 0.1, 128), taps, padding=1),
            [n(2, 2, 5), kernel],
        ),
        "QLinearAdd": (
            "r = com.microsoft.QLinearAdd (q, wide, zero, q, wide, zero, wide, zero)",
            lambda x: 2 * _rounded(x, 0.1, 128),
            [n(3, 4)],
        ),
        "QLinearMul": (
            "r = com.microsoft.QLinearMul (q, wide, zero, q, wide, zero, wide, zero)",
            lambda x: _rounded(x, 0.1, 128) ** 2,
            [n(3, 4)],
        ),
        "QLinearConcat": (
            "r = com.microsoft.QLinearConcat <axis = 1> "
            "(wide, zero, q, wide, zero, q, wide, zero)",
            lambda x: torch.cat([_rounded(x, 0.1, 128)] * 2, 1),
            [n(3, 4)],
        ),
        "QLinearSigmoid": (
            "r = com.microsoft.QLinearSigmoid (q, wide, zero, wide, zero)",
            lambda x: _rounded(torch.sigmoid(_rounded(x, 0.1, 128)), 0.1, 128),
            [n(3, 4)],
        ),
        "QLinearLeakyRelu": (
            "r = com.microsoft.QLinearLeakyRelu <alpha = 0.1> (q, wide, zero, wide, zero)",
            lambda x: F.leaky_relu(_rounded(x, 0.1, 128), 0.1),
            [a(3, 4)],
        ),
        "QLinearSoftmax": (
            "r = com.microsoft.QLinearSoftmax <axis = 1, opset = 13> "
            "(q, wide, zero, wide, zero)",
            lambda x: _rounded(x, 0.1, 128).softmax(1),
            [n(3, 4)],
        ),
        "QLinearAveragePool": (
            "r = com.microsoft.QLinearAveragePool <kernel_shape = [2]> "
            "(q, wide, zero, wide, zero)",
            lambda x: F.avg_pool1d(_rounded(x, 0.1, 128), 2, 1),
            [n(2, 3, 5)],
        ),
        "QLinearGlobalAveragePool": (
            "r = com.microsoft.QLinearGlobalAveragePool (q, wide, zero, wide, zero)",
            lambda x: _rounded(x, 0.1, 128).mean((2, 3), True),
            [n(2, 3, 5, 2)],
        ),
    }
    for op, (line, function, inputs) in lines.items():
        case(
            op,
            lambda *t, f=function: _rounded(f(*t), 0.1, 128),
            inputs,
            text=quantise + line + after,
        )
    case(
        "MatMulIntegerToFloat",
        lambda x, w: x @ floats,
        [n(3, 4), weight],
        text=constants
        + """
        q, s, z = DynamicQuantizeLinear (x0)
        y0 = com.microsoft.MatMulIntegerToFloat (q, x1, s, unit, z, zero)""",
    )
    case(
        "DequantizeLinear",
        lambda x: _rounded(x, 0.1, 128),
        [n(3, 4)],
        text=quantise + " y0 = DequantizeLinear (q, wide, zero)",
    )
    _quantised_attention()
    for taken in (True, False):
        case(
            "If",
            lambda x, w, c, t=taken: torch.exp(w * x) * w if t else x + x,
            [n(3, 4), n(4), np.array(taken)],
            kind=str(taken).lower(),
            text="""
            h = Mul (x0, x1)
            y0 = If (x2) <
                then_branch = yes () => (float[a, b] p) { e = Exp (h) p = Mul (e, x1) },
                else_branch = no () => (float[a, b] p) { p = Add (x0, x0) }
            >""",
        )


def _quantised_attention() -> None:
    weight = _bytes(6, 12)
    floats = (torch.tensor(weight.astype(np.float64)) - 128) * 0.02

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        q, k, v = (
            _heads(part, 2) for part in (_rounded(x, 0.1, 128) @ floats + b).chunk(3, -1)
        )
        return _merged(F.scaled_dot_product_attention(q, k, v))

    case(
        "QAttention",
        function,
        [n(2, 4, 6), weight, n(12)],
        text="""
        zero = Constant <value = uint8 {128}> () unit = Constant <value = float {0.02}> ()
        wide = Constant <value = float {0.1}> ()
        q = QuantizeLinear (x0, wide, zero)
        y0 = com.microsoft.QAttention <num_heads = 2> (q, x1, x2, wide, unit, , zero, zero)""",
    )


def means_at_the_border() -> None:
    """AveragePool where the last window is not full, with padding that counts and does not."""
    for counted in (False, True):
        case(
            "AveragePool",
            lambda x, counted=counted: F.avg_pool2d(x, 3, 2, 1, True, counted),
            [n(2, 2, 6, 7)],
            kind=f"up to the border, counted {int(counted)}",
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
            ceil_mode=1,
            count_include_pad=int(counted),
        )


def main() -> None:
    """Make all cases, and write them."""
    torch.manual_seed(0)
    for make in (pointwise, binary, products, reductions, norms, moving, convolutions):
        make()
    quantised()
    recurrent()
    attentions()
    several()
    means_at_the_border()
    index = np.frombuffer(json.dumps(CASES).encode(), np.uint8)
    counts = np.concatenate([item.astype(np.int64) for item in COUNTS])
    np.savez_compressed(FILE, index=index, floats=np.concatenate(FLOATS), counts=counts)


if __name__ == "__main__":
    main()
