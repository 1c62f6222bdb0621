"""Edits: what a checkpoint asks for, by modules of PyTorch. No graph is needed to say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnx_adapt.dtypes import Array


@dataclass(frozen=True, slots=True)
class LowRank:
    """LoRA on one module: `y += scale * (B (A x) + bias)`, and DoRA's rescaling.

    Attributes:
        module: Path of the Linear, Conv1D, Conv2d or Embedding.
        a: `(r, in)`; `(r, in, kh, kw)` for Conv2d; `(r, vocabulary)` for Embedding.
        b: `(out, r)`; trailing ones for Conv2d.
        scale: alpha / r or what replaces it.
        bias: `(out,)` or None; inside the scaling.
        magnitude: DoRA's `(out,)` or None.
        norm_scale: What multiplies `BA` inside DoRA's norm.
        scales_bias: Whether DoRA's rescaling covers the module's bias.
        gate: `(1, in)` and `(1,)` of AdapterHub's gate, or None.
        dilates: Whether A has the dilation of the Conv2d; LoRA's has none.
        invocation: The tokens from which on aLoRA is on; empty if it always is.
    """

    module: str
    a: Array
    b: Array
    scale: float
    bias: Array | None = None
    magnitude: Array | None = None
    norm_scale: float = 1.0
    scales_bias: bool = False
    gate: tuple[Array, Array] | None = None
    dilates: bool = False
    invocation: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BySize:
    """A low-rank update that depends on the sizes of its module, which the files do not tell.

    Attributes:
        module: Path of the Linear or Conv1D.
        make: The update from the module's `in` and `out`.
    """

    module: str
    make: Callable[[int, int], LowRank | Reweight]


@dataclass(frozen=True, slots=True)
class ParameterLowRank:
    """LoRA on a parameter that its module uses without a layer: stacked experts, an LSTM.

    Attributes:
        module: Path of the module.
        parameter: The parameter's name in the module, such as `gate_up_proj`.
        down: `(groups, r, in)`: A for each matrix of the parameter.
        up: `(groups, out, r)`: B for each.
        scale: alpha / r or what replaces it.
        sums_over_input: Whether `in` is known to be the axis that the module sums over; it may
            be the other one else.
    """

    module: str
    parameter: str
    down: Array
    up: Array
    scale: float
    sums_over_input: bool = False


@dataclass(frozen=True, slots=True)
class Scaling:
    """IA3 on one module: its input or its output is multiplied by a vector.

    Attributes:
        module: Path of the module.
        vector: `(in,)` or `(out,)`.
        on_input: Whether the input is scaled.
    """

    module: str
    vector: Array
    on_input: bool


@dataclass(frozen=True, slots=True)
class Replacement:
    """A weight of the base that was trained as well.

    Attributes:
        module: Path of the module.
        parameter: `weight` or `bias`.
        value: In PyTorch's layout.
        of_base: Whether the checkpoint calls it the base's own, so that it may be a copy.
    """

    module: str
    parameter: str
    value: Array
    of_base: bool = False


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding that were trained, one for each of some tokens.

    Attributes:
        module: Path of the Embedding, or of a Linear that has an output for each token.
        tokens: The `k` tokens.
        rows: `(k, width)`: their rows after training.
        others: The tokens of other modules that have trained rows.
        table: `(vocabulary, width)`: the base's weight as the checkpoint has it, or None.
    """

    module: str
    tokens: tuple[int, ...]
    rows: Array
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    table: Array | None = None


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """A bottleneck adapter around one sub-layer.

    Attributes:
        module: Path of the sub-layer's output Linear.
        place: Where the adapter sits: `output` (after the Linear), `residual` (after the
            residual Add) or `norm` (after the LayerNorm behind it).
        reads: What it reads: `target`; `residual_input`; `norm` (the target with the
            LayerNorm behind it applied); `sum` (target plus residual input), `normed_sum`.
        parts: The slot's weights by part, in the slot's layout.
        activation: Name in `onnx_adapt.slot.activations`.
        norm_after: `term`, `sum` or ''.
    """

    module: str
    place: str
    reads: str
    parts: dict[str, Array]
    activation: str
    norm_after: str = ""


@dataclass(frozen=True, slots=True)
class Coupling:
    """A NICE coupling on the output of a module (invertible adapters).

    Attributes:
        module: Path of the embeddings.
        parts: The slot's weights by part.
        activation: Name in `onnx_adapt.slot.activations`.
    """

    module: str
    parts: dict[str, Array]
    activation: str


Weighed = tuple[Array, Array | None]
"""The weight of a layer in PyTorch's layout, and its bias or None."""


@dataclass(frozen=True, slots=True)
class Reweight:
    """A weight that is computed from the base's own: `weight, bias = compute(weight, bias)`.

    Attributes:
        module: Path of the Linear, Conv1D, Conv2d or Embedding.
        compute: From the base's weight `(out, in)`, or `(out, in, kh, kw)` for Conv2d, and
            its bias `(out,)` or None, in float64, to the trained ones. It raises a
            CheckpointError if they are of another size.
        rank: The highest rank that the change of the weight can have, for a convolution as
            `(out, in * kh * kw)`; None where the method does not bound it.
        is_even: Whether the method convolves with the same stride and padding along all
            axes, without dilation, whatever the layer does.
    """

    module: str
    compute: Callable[[Array, Array | None], Weighed]
    rank: int | None = None
    is_even: bool = False


@dataclass(frozen=True, slots=True)
class VirtualTokens:
    """Trained tokens before all others, which only a decoder's past can hold: of no module.

    Attributes:
        method: What trained them, such as `PREFIX_TUNING`.
        rows: `(tokens, width)`: their embeddings, or what their keys and values are cut from.
        states: Keys and values of each layer in turn, `(1, heads, tokens, size)`; empty if
            they follow from the embeddings.
        module: ''.
    """

    method: str
    rows: Array
    states: tuple[Array, ...] = ()
    module: str = ""


Edit = (
    LowRank
    | BySize
    | ParameterLowRank
    | Scaling
    | Replacement
    | Reweight
    | TokenRows
    | Bottleneck
    | Coupling
    | VirtualTokens
)


@dataclass(frozen=True, slots=True)
class SlotEdit:
    """What the weights of one slot ask for.

    Attributes:
        slot: The name of the slot, or of the replaced weight.
        edit: The edit.
        layer: What the module is: `linear`, `conv`, `embedding`, or '' if it is no layer.
        biased: Whether it is a layer with a bias.
    """

    slot: str
    edit: Edit
    layer: str = ""
    biased: bool = False


KEEP = "keep the adapter file, which needs no library"
"""What to do with an adapter that a library cannot express: a hint."""
