"""Rules for normalisations."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from onnx_adapt.graph.gradients.rule import Grads, Rule, Step
from onnx_adapt.graph.gradients.tape import Tape

FLOAT = onnx.TensorProto.FLOAT

# A normalisation is `y = scale * xhat + bias` with `xhat = (x - mean) * inverse`, where
# `inverse = 1 / sqrt(mean((x - mean) ** 2) + epsilon)` over some axes. With
# `g = dy * scale` its gradient is
#
#     dx = inverse * (g - mean(g) - xhat * mean(g * xhat))
#
# An RMS normalisation subtracts no mean, so `mean(g)` is left out. Half precision is computed
# in float32, as the operators themselves do.


def normalised(
    tape: Tape, x: str, axes: Sequence[int], epsilon: float, *, centred: bool = True
) -> tuple[str, str]:
    """`xhat` and `inverse` of a tensor, in float32 or wider."""
    wide = tape.cast(x, max(FLOAT, tape.elem_type(x)) if _is_wide(tape, x) else FLOAT)
    difference = tape.add("Sub", wide, tape.mean(wide, axes)) if centred else wide
    variance = tape.mean(tape.add("Mul", difference, difference), axes)
    inverse = tape.add("Reciprocal", tape.add("Sqrt", tape.plus(variance, epsilon)))
    return tape.add("Mul", difference, inverse), inverse


def _is_wide(tape: Tape, tensor: str) -> bool:
    return tape.elem_type(tensor) in (FLOAT, onnx.TensorProto.DOUBLE)


def norm_grad(
    tape: Tape, grad: str, hat: tuple[str, str], axes: Sequence[int], *, centred: bool = True
) -> str:
    """The gradient of `x` from that of `xhat`, both in `hat`'s element type."""
    xhat, inverse = hat
    along = tape.add("Mul", xhat, tape.mean(tape.add("Mul", grad, xhat), axes))
    if centred:
        grad = tape.add("Sub", grad, tape.mean(grad, axes))
    return tape.add("Mul", inverse, tape.add("Sub", grad, along))


def layer_norm(tape: Tape, step: Step) -> Grads:
    """LayerNormalization, and RMS normalisations under their several names."""
    centred = step.node.op_type == "LayerNormalization"
    x = step.input(0)
    return _affine_norm(tape, step, x, scale=1, bias=2 if centred else None, centred=centred)


def _affine_norm(
    tape: Tape, step: Step, x: str, *, scale: int, bias: int | None, centred: bool
) -> list[str | None]:
    """The gradients of x, scale and bias, at the positions of a node's inputs."""
    rank = tape.rank(x)
    axes = list(range(step.attribute("axis", -1) % rank, rank))
    hat = normalised(tape, x, axes, step.attribute("epsilon", 1e-5), centred=centred)
    wide = tape.elem_type(hat[0])
    grad = tape.cast(step.grad, wide)
    grads: list[str | None] = [None] * len(step.node.input)
    weight = step.input(scale)
    scaled = tape.add("Mul", grad, tape.cast(weight, wide))
    grads[0] = tape.cast(
        norm_grad(tape, scaled, hat, axes, centred=centred), tape.elem_type(x)
    )
    if step.wants(scale):
        summed = tape.unbroadcast(tape.add("Mul", grad, hat[0]), weight, x)
        grads[scale] = tape.cast(summed, tape.elem_type(weight))
    if bias is not None and step.wants(bias):
        name = step.input(bias)
        grads[bias] = tape.cast(tape.unbroadcast(grad, name, x), tape.elem_type(name))
    return grads


def skip_norm(tape: Tape, step: Step) -> Grads:
    """SkipLayerNormalization of ONNX Runtime, and its RMS kin: the norm of a sum.

    Inputs are x, skip, scale, then bias (not of the RMS kind) and a bias of the sum. The last
    output is the sum itself, which the residual connection reads.
    """
    centred = step.node.op_type == "SkipLayerNormalization"
    inner = 4 if centred else 3
    terms = [position for position in (0, 1, inner) if step.input(position)]
    total = str(step.node.output[3]) if len(step.node.output) > 3 else ""
    if not total:
        total = tape.add("Add", step.input(0), step.input(1))
        total = tape.add("Add", total, step.input(inner)) if inner in terms else total
    grads: list[str | None] = [None] * len(step.node.input)
    made = ""
    if step.grads[0]:
        grads = _skip_affine(tape, step, total, centred=centred)
        made = str(grads[0])
    if len(step.grads) > 3 and step.grads[3]:
        made = tape.add("Add", made, step.grads[3]) if made else step.grads[3]
    for position in terms:
        grads[position] = tape.unbroadcast(made, step.input(position), step.input(0))
    return grads


def _skip_affine(tape: Tape, step: Step, total: str, *, centred: bool) -> list[str | None]:
    """The gradients of the sum (in the place of x), scale and bias."""
    axes = [tape.rank(step.input(0)) - 1]
    hat = normalised(tape, total, axes, step.attribute("epsilon", 1e-12), centred=centred)
    wide = tape.elem_type(hat[0])
    grad = tape.cast(step.grad, wide)
    grads: list[str | None] = [None] * len(step.node.input)
    scale, bias = step.input(2), step.input(3) if centred else ""
    scaled = tape.add("Mul", grad, tape.cast(scale, wide))
    back = norm_grad(tape, scaled, hat, axes, centred=centred)
    grads[0] = tape.cast(back, tape.elem_type(total))
    if step.wants(2):
        grads[2] = tape.unbroadcast(tape.add("Mul", grad, hat[0]), scale, step.input(0))
    if bias and step.wants(3):
        grads[3] = tape.unbroadcast(grad, bias, step.input(0))
    return grads


def batch_norm(tape: Tape, step: Step) -> Grads:
    """BatchNormalization with fixed statistics: a scaling of each channel."""
    if step.attribute("training_mode", 0):
        raise step.refuse("it is in training mode")
    x, scale, _, mean, variance = (step.input(i) for i in range(5))
    rank = tape.rank(x)
    spread = [1] * (rank - 2)

    def channels(name: str) -> str:
        shaped = tape.add("Reshape", name, tape.integers(-1, *spread)) if rank > 2 else name
        return tape.cast(shaped, tape.elem_type(x))

    root = tape.add("Sqrt", tape.plus(channels(variance), step.attribute("epsilon", 1e-5)))
    inverse = tape.add("Reciprocal", root)
    grads: list[str | None] = [None] * len(step.node.input)
    if step.wants(0):
        grads[0] = tape.add("Mul", step.grad, tape.add("Mul", channels(scale), inverse))
    others = [axis for axis in range(rank) if axis != 1]
    if step.wants(1):
        hat = tape.add("Mul", tape.add("Sub", x, channels(mean)), inverse)
        grads[1] = tape.total(tape.add("Mul", step.grad, hat), others, keep=False)
    if step.wants(2):
        grads[2] = tape.total(step.grad, others, keep=False)
    return grads


def instance_norm(tape: Tape, step: Step) -> Grads:
    """InstanceNormalization: over the positions of each channel of each row."""
    x, scale = step.input(0), step.input(1)
    rank = tape.rank(x)
    axes = list(range(2, rank))
    hat = normalised(tape, x, axes, step.attribute("epsilon", 1e-5))
    wide = tape.elem_type(hat[0])
    grad = tape.cast(step.grad, wide)
    weight = tape.add("Reshape", tape.cast(scale, wide), tape.integers(-1, *[1] * (rank - 2)))
    back = norm_grad(tape, tape.add("Mul", grad, weight), hat, axes)
    grads: list[str | None] = [tape.cast(back, tape.elem_type(x)), None, None]
    others = [axis for axis in range(rank) if axis != 1]
    if step.wants(1):
        grads[1] = tape.total(tape.add("Mul", grad, hat[0]), others, keep=False)
    if step.wants(2):
        grads[2] = tape.total(grad, others, keep=False)
    return grads


def lp_norm(tape: Tape, step: Step) -> Grads:
    """LpNormalization with p = 2: `x / norm`."""
    if step.attribute("p", 2) != 2:
        raise step.refuse("its p is not 2")
    x = step.input()
    axes = (step.attribute("axis", -1) % tape.rank(x),)
    norm = tape.add("Sqrt", tape.total(tape.add("Mul", x, x), axes))
    along = tape.total(tape.add("Mul", step.grad, step.output), axes)
    rest = tape.add("Sub", step.grad, tape.add("Mul", step.output, along))
    return (tape.add("Div", rest, norm),)


NORMS: dict[str, Rule] = {
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), layer_norm
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), skip_norm),
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LpNormalization": lp_norm,
}
"""The rules by operator."""
