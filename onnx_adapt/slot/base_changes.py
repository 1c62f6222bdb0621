"""Records of what is changed of the base: replaceable weights, heads, ranges, fused nodes."""

from __future__ import annotations

from dataclasses import dataclass

from onnx_adapt.slot.record import Extra, SameAs, absent


@dataclass(frozen=True, slots=True)
class ReplaceableWeight:
    """A weight of the base that adapters may replace: a trained head, a bias.

    Attributes:
        name: Its name in the model, and of the input that feeds it.
        original: The base's name for it.
        copied: Whether it is a copy, and the original is still there.
        swappable: Whether it can be fed at inference time.
        trained: Whether the value in the model is an adapter's, not the base's.
        default: The initializer that keeps its value where it must be fed, or ''.
        extra: Keys of its record that this version does not know, with JSON texts.
    """

    name: str
    original: str = absent(SameAs("name"))
    copied: bool = absent(False)
    swappable: bool = absent(True)
    trained: bool = absent(False)
    default: str = ""
    extra: Extra = ()


@dataclass(frozen=True, slots=True)
class Head:
    """A linear layer on an output of the base, with an output of its own.

    Attributes:
        name: Its name, and that of its output.
        tensor: The output of the base that it reads.
        pooling: How positions become one vector.
        extra: Keys of its record that this version does not know, with JSON texts.
    """

    name: str
    tensor: str
    pooling: str
    extra: Extra = ()


@dataclass(frozen=True, slots=True)
class Widened:
    """A scale, zero point or bias of the base that was widened for the values of an adapter.

    Attributes:
        quantizer: Output of the QuantizeLinear whose range was widened.
        name: The constant that its nodes read now.
        original: The base's, which is still in the model.
        extra: Keys of its record that this version does not know, with JSON texts.
    """

    quantizer: str
    name: str
    original: str
    extra: Extra = ()


@dataclass(frozen=True, slots=True)
class Unfused:
    """A fused node of the base that was written out for the slots.

    Attributes:
        label: Where it is: the path of its graph, a colon, its first output. The nodes that
            stand for it are marked with it.
        op: Its operator.
        node: The node itself, in hexadecimal.
        constants: The initializers that were added for it.
        tensor: The layer's product that it reads; '' if the layer is inside it.
        residual: Whether the sum with a residual connection was taken out as well.
        extra: Keys of its record that this version does not know, with JSON texts.
    """

    label: str
    op: str
    node: str
    constants: tuple[str, ...] = ()
    tensor: str = ""
    residual: bool = False
    extra: Extra = ()
