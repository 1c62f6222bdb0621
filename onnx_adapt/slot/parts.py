"""The table of the parts of a slot.

A part is one weight of a slot. All that is true of a part is one row of `PARTS`, except for
the arithmetic: a new part is a row here, its line in the nodes (`formula.py`) and the same
line in float64 (`oracle.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from onnx_adapt.errors import SlotError

Size = Literal["r", "width", "source", "half", "window", "ones", 1]
"""One size in a shape: the bottleneck `r`, the width of the target, the width of the source,
or half the width of the target. On a channel axis, `window` is the kernel of a convolution
and `ones` is a 1 for each axis behind the channels."""


class Blend(Enum):
    """How the values of several adapters make one value of a blend.

    With shares `w_i` a blend is `target + sum_i w_i * (target'_i - target)`.
    """

    BESIDE = "laid side by side along the bottleneck"
    SCALED_BESIDE = "multiplied by share and gain, laid side by side along the bottleneck"
    SCALED_SUM = "sum of w_i * gain_i * value_i"
    SUM = "sum of w_i * value_i"
    FACTOR = "1 + sum of w_i * (value_i - 1)"
    FOLDED = "1: each adapter's own goes into its up-projection"
    SHARED = "one value that all have in common; differences go into `down`"
    CLOSED = "refused"


class Draw(Enum):
    """How the proof draws random values, so that they move the output by its own size."""

    FAN_IN = "normal, by the size of the source and the root of the fan-in"
    TARGET = "normal, by the size of the target and the root of the bottleneck"
    NEAR_ONE = "1 + 0.3 * normal"
    NORMAL = "normal"


@dataclass(frozen=True, slots=True)
class RowForm:
    """What a batched slot has beside a part: a value for each row of the batch.

    It is no weight: no adapter has it, and a run with one adapter does not feed it.

    Attributes:
        name: The last part of the input's name.
        op: `Mul` or `Add`: how it meets the part. What it is fed with while nothing is to
            change follows: 1 or 0.
        size: Its size behind the rows. With the size `r` it is a mask: it multiplies the
            units of the bottleneck in place of the part.
        draw: How the proof draws random values.
    """

    name: str
    op: Literal["Mul", "Add"]
    size: Size
    draw: Draw

    @property
    def masks(self) -> bool:
        """Whether it multiplies the units of the bottleneck."""
        return self.size == "r"

    @property
    def off(self) -> float:
        """The value that changes nothing."""
        return 1.0 if self.op == "Mul" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One row of the table. No column has a default: a row that lacks one is an error.

    Attributes:
        shape: Its shape where the features are the last axis.
        channels: Its shape on a channel axis, or None if it cannot be there.
        off: Its value in a slot that has no adapter.
        silences: Whether the slot gives its target only if this part has its off value.
            Parts like `down` may have any value while `up` is zero.
        optional: Whether an adapter may leave it out: it changes nothing at its off value.
        needs: Parts of which the slot must have one.
        coupling: Whether it belongs to the coupling, the one slot of another shape.
        projects: Whether it is a first projection: the activation follows it, and training
            starts from random values of it.
        meets: Whether positions of the tensor meet in it, so that the formula holds for the
            whole tensor only and not for each position by itself.
        blend: How a blend makes it.
        closed: Why it cannot be blended, or ''.
        row: What a batched slot has beside it for each row, or None.
        draw: How the proof draws random values.
    """

    shape: tuple[Size, ...]
    channels: tuple[Size, ...] | None
    off: float
    silences: bool
    optional: bool
    needs: tuple[str, ...]
    coupling: bool
    projects: bool
    meets: bool
    blend: Blend
    closed: str
    row: RowForm | None
    draw: Draw

    def bottleneck_axis(self, *, channels: bool) -> int | None:
        """The axis of the bottleneck, or None."""
        shape = self.channels or () if channels else self.shape
        return shape.index("r") if "r" in shape else None


_MASK = RowForm("mask", "Mul", "r", Draw.NORMAL)
ACTIVE = RowForm("active", "Mul", 1, Draw.NORMAL)
"""Of a slot that is on for some tokens alone: `(rows, positions, 1)`, times its term."""

_GATE, _NORM, _NICE = (
    "a gate",
    "a normalisation of its term",
    "an invertible adapter's coupling",
)

_Network = tuple[str, tuple[Size, ...], bool, bool, Draw]
_NETWORK: tuple[_Network, ...] = (  # part, shape, silences, projects, draw
    ("down", ("half", "r"), False, True, Draw.FAN_IN),
    ("down_bias", ("r",), False, False, Draw.NORMAL),
    ("up", ("r", "half"), True, False, Draw.TARGET),
    ("up_bias", ("half",), True, False, Draw.TARGET),
)
"""The networks `f` and `g` of a coupling."""

# fmt: off
PARTS: dict[str, Part] = {
    "down": Part(
        shape=("source", "r"), channels=("r", "source", "window"),
        off=0, silences=False, optional=False, needs=("up",),
        coupling=False, projects=True, meets=False,
        blend=Blend.BESIDE, closed="", draw=Draw.FAN_IN,
        row=None,
    ),
    "up": Part(
        shape=("r", "width"), channels=("width", "r", "ones"),
        off=0, silences=True, optional=False, needs=("down", "table"),
        coupling=False, projects=False, meets=False,
        blend=Blend.SCALED_BESIDE, closed="", draw=Draw.TARGET,
        row=_MASK,
    ),
    "down_bias": Part(
        shape=("r",), channels=("r",),
        off=0, silences=False, optional=True, needs=("down",),
        coupling=False, projects=False, meets=False,
        blend=Blend.BESIDE, closed="", draw=Draw.NORMAL,
        row=None,
    ),
    "up_bias": Part(
        shape=("width",), channels=("width",),
        off=0, silences=True, optional=True, needs=("up",),
        coupling=False, projects=False, meets=False,
        blend=Blend.SCALED_SUM, closed="", draw=Draw.TARGET,
        row=RowForm("row_up_bias", "Add", "width", Draw.TARGET),
    ),
    "scale": Part(
        shape=("width",), channels=("width", "ones"),
        off=1, silences=True, optional=True, needs=(),
        coupling=False, projects=False, meets=False,
        blend=Blend.FACTOR, closed="", draw=Draw.NEAR_ONE,
        row=RowForm("row_scale", "Mul", "width", Draw.NEAR_ONE),
    ),
    "gain": Part(
        shape=("width",), channels=("width", "ones"),
        off=1, silences=False, optional=True, needs=("up",),
        coupling=False, projects=False, meets=False,
        blend=Blend.FOLDED, closed="", draw=Draw.NEAR_ONE,
        row=None,
    ),
    "norm_weight": Part(
        shape=("source",), channels=None,
        off=1, silences=False, optional=False, needs=("down",),
        coupling=False, projects=False, meets=False,
        blend=Blend.SHARED, closed="", draw=Draw.NEAR_ONE,
        row=None,
    ),
    "norm_bias": Part(
        shape=("source",), channels=None,
        off=0, silences=False, optional=False, needs=("norm_weight",),
        coupling=False, projects=False, meets=False,
        blend=Blend.SHARED, closed="", draw=Draw.NORMAL,
        row=None,
    ),
    "gate": Part(
        shape=("source", 1), channels=None,
        off=0, silences=False, optional=False, needs=("down",),
        coupling=False, projects=False, meets=True,
        blend=Blend.CLOSED, closed=_GATE, draw=Draw.NORMAL,
        row=None,
    ),
    "gate_bias": Part(
        shape=(1,), channels=None,
        off=0, silences=False, optional=False, needs=("gate",),
        coupling=False, projects=False, meets=False,
        blend=Blend.CLOSED, closed=_GATE, draw=Draw.NORMAL,
        row=None,
    ),
    "after_weight": Part(
        shape=("width",), channels=None,
        off=1, silences=False, optional=False, needs=("up",),
        coupling=False, projects=False, meets=False,
        blend=Blend.CLOSED, closed=_NORM, draw=Draw.NEAR_ONE,
        row=None,
    ),
    "after_bias": Part(
        shape=("width",), channels=None,
        off=0, silences=True, optional=False, needs=("after_weight",),
        coupling=False, projects=False, meets=False,
        blend=Blend.CLOSED, closed=_NORM, draw=Draw.NORMAL,
        row=None,
    ),
    "residual": Part(
        shape=(1,), channels=None,
        off=0, silences=True, optional=False, needs=(),
        coupling=False, projects=False, meets=False,
        blend=Blend.SUM, closed="", draw=Draw.NORMAL,
        row=RowForm("row_residual", "Add", 1, Draw.NORMAL),
    ),
    "skip": Part(
        shape=(1,), channels=None,
        off=0, silences=True, optional=False, needs=("up",),
        coupling=False, projects=False, meets=False,
        blend=Blend.SUM, closed="", draw=Draw.NORMAL,
        row=RowForm("row_skip", "Add", 1, Draw.NORMAL),
    ),
    "switch": Part(
        shape=(1,), channels=None,
        off=0, silences=True, optional=False, needs=(),
        coupling=False, projects=False, meets=False,
        blend=Blend.CLOSED, closed=_NORM, draw=Draw.NEAR_ONE,
        row=None,
    ),
    "table": Part(
        shape=("source", "r"), channels=None,
        off=0, silences=False, optional=False, needs=("up",),
        coupling=False, projects=True, meets=True,
        blend=Blend.BESIDE, closed="", draw=Draw.NORMAL,
        row=None,
    ),
    **{
        f"{network}_{part}": Part(
            shape=shape, channels=None,
            off=0, silences=silences, optional=False, needs=(),
            coupling=True, projects=projects, meets=False,
            blend=Blend.CLOSED, closed=_NICE, draw=draw,
            row=None,
        )
        for network in ("f", "g")
        for part, shape, silences, projects, draw in _NETWORK
    },
}
# fmt: on
"""Every weight that a slot can have, in the order of the formula.

`table` is in place of `down` where the source is ids. The parts `f_...` and `g_...` are the
two networks of a NICE coupling (Dinh et al., 2014), `y1 = x1 + f(x2); y2 = x2 + g(y1)` on the
halves of the target."""


def part_of(name: str) -> Part:
    """The row of a part.

    Raises:
        SlotError: If no part has this name.
    """
    if name not in PARTS:
        raise SlotError(f"unknown part {name!r}", hint=f"known: {', '.join(PARTS)}")
    return PARTS[name]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Parts in the order of the table, which is that of the formula.

    Raises:
        SlotError: If one of them is unknown.
    """
    wanted = {name: part_of(name) for name in names}
    return tuple(name for name in PARTS if name in wanted)


def coupling_parts() -> tuple[str, ...]:
    """The parts of the coupling."""
    return tuple(name for name, part in PARTS.items() if part.coupling)
