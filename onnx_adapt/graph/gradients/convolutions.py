"""Rules for convolutions and pooling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnx_adapt.graph.gradients.moving import added
from onnx_adapt.graph.gradients.rule import Grads, Rule, Step, only
from onnx_adapt.graph.gradients.tape import INT64, Tape

# A convolution reads `k` numbers for each position of its output, `stride` apart. Its gradient
# is the transposed convolution, which spreads each number of the output's gradient over the
# `k` that it was made of. An example on one axis: 6 numbers with one of padding on each side
# are 8; a kernel of 3 and a stride of 2 make 3 of them. Spread again these cover
# 2 * 2 + 3 = 7 of the 8. The eighth had no part in the output and gets zero, and the padding
# is cut off. One Pad node does both: -1 at the start cuts, and the difference of the sizes at
# the end cuts or fills up.


@dataclass(frozen=True, slots=True)
class _Window:
    """How a convolution or pooling walks over its input, one entry for each spatial axis.

    Attributes:
        kernel: Sizes of the kernel.
        strides: Steps of the output.
        dilations: Steps inside the kernel.
        begin: The padding at the start, in a run: `(axes,)`.
        pads: The padding at the start and the end if it is known; None with `auto_pad`.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: str
    pads: tuple[int, ...] | None

    @property
    def spans(self) -> list[int]:
        """How far each kernel reaches."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


def _window(tape: Tape, step: Step, kernel: tuple[int, ...]) -> _Window:
    axes = len(kernel)
    strides = tuple(step.attribute("strides", None) or [1] * axes)
    dilations = tuple(step.attribute("dilations", None) or [1] * axes)
    mode = step.attribute("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        pads = tuple(step.attribute("pads", None) or [0] * 2 * axes)
        pads = pads if mode == "NOTSET" else (0,) * (2 * axes)
        return _Window(kernel, strides, dilations, tape.integers(*pads[:axes]), pads)
    found = _Window(kernel, strides, dilations, "", None)
    begin = _same_padding(tape, step, found, upper=mode == "SAME_UPPER")
    return _Window(kernel, strides, dilations, begin, None)


def _same_padding(tape: Tape, step: Step, window: _Window, *, upper: bool) -> str:
    """The padding at the start that makes an output of size / stride, in a run."""
    sizes = _spatial(tape, step.input())
    total = tape.add("Sub", _reached(tape, step, window), sizes)
    total = tape.add("Max", total, tape.integers(0))
    more = total if upper else tape.add("Add", total, tape.integers(1))
    return tape.add("Div", more, tape.integers(2))


def _reached(tape: Tape, step: Step, window: _Window) -> str:
    """How much of the padded input the output is made of, in a run."""
    steps = tape.add("Sub", _spatial(tape, step.output), tape.integers(1))
    reached = tape.add("Mul", steps, tape.integers(*window.strides))
    return tape.add("Add", reached, tape.integers(*window.spans))


def _spatial(tape: Tape, tensor: str) -> str:
    """The sizes of the axes behind batch and channels, in a run."""
    return tape.joined(*(tape.size(tensor, axis) for axis in range(2, tape.rank(tensor))))


def _spread(
    tape: Tape, step: Step, grad: str, kernel: str, window: _Window, group: int
) -> str:
    """Spread a gradient of the output over the input, `(batch, channels, ...)`."""
    whole = tape.add(
        "ConvTranspose",
        grad,
        kernel,
        strides=list(window.strides),
        dilations=list(window.dilations),
        group=group,
    )
    covered = tape.add("Shape", whole, start=2, elem_type=INT64)
    inside = tape.add("Add", _spatial(tape, step.input()), window.begin)
    end = tape.add("Sub", inside, covered)
    start = tape.add("Neg", window.begin)
    none = tape.integers(0, 0)
    return tape.add("Pad", whole, tape.joined(none, start, none, end))


def conv(tape: Tape, step: Step, weight: str = "") -> Grads:
    """Convolution over any number of axes, grouped or not.

    Args:
        tape: Where nodes are added.
        step: The node.
        weight: The kernel in floats, if the node's own is not.
    """
    x, weight = step.input(0), weight or step.input(1)
    shape = tape.shape(step.input(1))
    kernel = tuple(size for size in shape[2:] if isinstance(size, int))
    if len(kernel) < len(shape) - 2:
        raise step.refuse("the size of its kernel is not known")
    group = step.attribute("group", 1)
    window = _window(tape, step, kernel)
    grads: list[str | None] = [None, None, None]
    if step.wants(0):
        grads[0] = _spread(tape, step, step.grad, weight, window, group)
    if step.wants(1):
        grads[1] = _kernel_grad(tape, step, window, group)
    if step.wants(2):
        others = [axis for axis in range(tape.rank(x)) if axis != 1]
        grads[2] = tape.total(step.grad, others, keep=False)
    return grads


def _kernel_grad(tape: Tape, step: Step, window: _Window, group: int) -> str:
    """The gradient of a kernel: the input convolved with the output's gradient.

    Batch and channels change places, and so do strides and dilations. What the stride left
    over at the end makes further entries, which are cut off.
    """
    if group != 1:
        raise step.refuse("the kernel of a grouped convolution cannot train")
    if window.pads is None:
        raise step.refuse("the kernel of a convolution with auto_pad cannot train")
    rank = len(window.kernel) + 2
    order = (1, 0, *range(2, rank))
    made = tape.add(
        "Conv",
        tape.permuted(step.input(), order),
        tape.permuted(step.grad, order),
        strides=list(window.dilations),
        dilations=list(window.strides),
        pads=list(window.pads),
    )
    axes = range(2, rank)
    cut = (tape.integers(*[0] * len(axes)), tape.integers(*window.kernel))
    return tape.permuted(tape.add("Slice", made, *cut, tape.integers(*axes)), order)


def conv_transpose(tape: Tape, step: Step) -> Grads:
    """Transposed convolution: its gradient is a convolution."""
    if any(step.wanted[1:]):
        raise step.refuse("the kernel of a transposed convolution cannot train")
    if step.attribute("auto_pad", "NOTSET") != "NOTSET" or step.attribute(
        "output_shape", None
    ):
        raise step.refuse("it is told the size of its output")
    axes = tape.rank(step.input()) - 2
    kept = {name: step.attribute(name, None) for name in ("strides", "dilations", "group")}
    pads = step.attribute("pads", None) or [0] * 2 * axes
    made = tape.add("Conv", step.grad, step.input(1), pads=pads, **kept)
    sizes = _spatial(tape, step.input())  # output_padding can make one more
    return only(
        tape.add(
            "Slice",
            made,
            tape.integers(*[0] * axes),
            sizes,
            tape.integers(*range(2, axes + 2)),
        )
    )


def max_pool(tape: Tape, step: Step) -> Grads:
    """MaxPool: each gradient goes to the place of its largest number."""
    if step.attribute("storage_order", 0):
        raise step.refuse("its storage_order is not 0")
    names = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "ceil_mode")
    kept = {name: step.attribute(name, None) for name in names}
    x = step.input()
    made = tape.add_several("MaxPool", (x,), 2, **kept)
    tape.elem_types[made[1]] = INT64
    count = tape.add("Reshape", tape.once("Size", x, elem_type=INT64), tape.integers(1))
    places, grads = (
        tape.add("Reshape", name, tape.integers(-1)) for name in (made[1], step.grad)
    )
    total = added(tape, "ScatterElements", count, places, grads, axis=0)
    return only(tape.like(total, x))


def average_pool(tape: Tape, step: Step) -> Grads:
    """AveragePool: each gradient is spread evenly over the numbers that were averaged.

    Channels count as samples of one channel, so that their number need not be known.
    """
    x = step.input()
    kernel = tuple(step.attribute("kernel_shape", ()))
    window = _window(tape, step, kernel)
    even = tape.constant(np.ones((1, 1, *kernel), tape.dtype(x)))
    single = tape.joined(tape.integers(-1, 1), _spatial(tape, step.output))
    grad = tape.add("Reshape", step.grad, single)
    if window.pads is None or any(window.pads) or step.attribute("ceil_mode", 0):
        grad = tape.add("Mul", grad, _share(tape, step, window, even))
    else:
        grad = tape.times(grad, 1 / int(np.prod(kernel)))
    return only(tape.like(_spread(tape, step, grad, even, window, 1), x))


def _share(tape: Tape, step: Step, window: _Window, even: str) -> str:
    """The share of each number in the mean it is a part of, `(1, 1, ...)`.

    What is behind the border may count in the mean or not, by three attributes. The mean of
    ones tells: if 4 numbers are averaged of which one is padding, it is 3/4, and 3 is the sum
    of the ones, so that the share is (3/4) / 3 = 1/4. If padding does not count, it is 1 / 3.
    """
    names = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "ceil_mode")
    kept = {name: step.attribute(name, None) for name in (*names, "count_include_pad")}
    sizes = _spatial(tape, step.input())
    shape = tape.joined(tape.integers(1, 1), sizes)
    ones = tape.add("Expand", tape.number(1, step.input()), shape)
    mean = tape.add("AveragePool", ones, **kept)
    end = tape.add("Sub", _reached(tape, step, window), sizes)
    end = tape.add("Sub", end, window.begin)
    none = tape.integers(0, 0)
    padded = tape.add("Pad", ones, tape.joined(none, window.begin, none, end))
    strides, dilations = list(window.strides), list(window.dilations)
    count = tape.add("Conv", padded, even, strides=strides, dilations=dilations)
    return tape.add("Div", mean, count)


def global_average_pool(tape: Tape, step: Step) -> Grads:
    """The mean over all positions."""
    sizes = [tape.once("Size", t, elem_type=INT64) for t in (step.output, step.input())]
    share = tape.add("Div", *(tape.cast(size, tape.elem_type(step.grad)) for size in sizes))
    even = tape.add("Mul", step.grad, share)
    return only(tape.add("Expand", even, tape.shape_of(step.input())))


def global_max_pool(tape: Tape, step: Step) -> Grads:
    """The largest of all positions, in equal parts to equal ones."""
    x = step.input()
    chosen = tape.compare("Equal", x, step.output)
    ones = tape.cast(chosen, tape.elem_type(x))
    count = tape.total(ones, range(2, tape.rank(x)))
    return only(tape.add("Mul", ones, tape.add("Div", step.grad, count)))


CONVOLUTIONS: dict[str, Rule] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
}
"""The rules by operator."""
