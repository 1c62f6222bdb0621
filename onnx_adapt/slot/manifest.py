"""The record of slots that is written into a model, and nothing but the record.

It is one JSON document in the model's `metadata_props`, so any tool that reads ONNX
metadata can read it, ONNX Runtime included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from onnx_adapt.dtypes import DTYPES
from onnx_adapt.errors import ManifestError
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.names import weight_name

if TYPE_CHECKING:
    import onnx

KEY = "onnx_adapt"
FORMAT = 1

SLOT_KEY = "pkg.onnx_adapt.slot"
"""Key in a node's `metadata_props`: the slot the node was inserted for."""


ROW_PARTS = {
    "up": "mask",
    **{part: f"row_{part}" for part in ("up_bias", "scale", "residual", "skip")},
}
"""What a batched slot has beside some of its weights: a value for each row of the batch.

`mask` multiplies the units of the bottleneck, `row_scale` the scale; the others are added.
They are no weights: no adapter has them, and a run with one adapter does not feed them."""


def slot_of(node: onnx.NodeProto | onnx.ValueInfoProto) -> str:
    """The slot a node, or the record of a shape, was inserted for, or ''."""
    for entry in node.metadata_props:
        if entry.key == SLOT_KEY:
            return str(entry.value)
    return ""


@dataclass(frozen=True, slots=True)
class Slot:
    """Nodes inserted at one site, with weights of their own.

    Attributes:
        name: Unique in the model.
        graph: Path of the graph the slot is in (`main` or the way to a body).
        node: Name of the node that produces the site's tensor.
        tensor: The site's tensor.
        inner: The name the producer's output has now.
        output: The name of the slot's output: `tensor`, or the `inner` of the slot
            stacked on this one.
        source: The tensor the adapter reads; equal to `inner` unless chosen.
        width: Size of the feature axis of the site's tensor.
        source_width: The same of the source.
        dtype: `float32`, `float16`, `bfloat16` or `float64`.
        axis: The feature axis: -1, or 1 for channels.
        rank: Number of axes of the tensor if the axis is 1 or the slot is batched, else 0.
        activation: Name of the activation between the projections.
        parts: Names of the weights, in the order of the formula.
        norm: Output tensor of a normalisation of the base that is re-applied to the
            source, or ''.
        norm_after: What the slot's own normalisation wraps: `term`, `sum` or ''.
        module: PyTorch module path of the site, or ''.
        swappable: Whether the weights can be fed at inference time.
        bottleneck: Inner size if it is fixed; 0 if each adapter brings its own.
        window: For a convolution that looks at more than one position: kernel, strides,
            pads and dilations of the down-projection, one after the other; else empty.
        plus: A tensor that is added to the source before anything else, or ''.
        batched: Whether one run can give each row of a batch another adapter.
    """

    name: str
    graph: str
    node: str
    tensor: str
    inner: str
    output: str
    source: str
    width: int
    source_width: int
    dtype: str
    axis: int
    rank: int
    activation: str
    parts: tuple[str, ...]
    norm: str
    norm_after: str
    module: str
    swappable: bool
    bottleneck: int
    window: tuple[int, ...] = ()
    plus: str = ""
    batched: bool = False

    def weight(self, part: str) -> str:
        """The name of one weight in the model, and of the input that feeds it."""
        return weight_name(self.name, part)

    @property
    def symbol(self) -> str:
        """The symbolic dimension of the bottleneck: each slot has its own."""
        return f"r_{self.name}"

    @property
    def row_parts(self) -> tuple[str, ...]:
        """What a batched slot has for each row; see `ROW_PARTS`."""
        if not self.batched:
            return ()
        return tuple(ROW_PARTS[part] for part in self.parts if part in ROW_PARTS)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of all its initializers: its weights, and what it has for each row."""
        return tuple(self.weight(part) for part in (*self.parts, *self.row_parts))


@dataclass(frozen=True, slots=True)
class ReplaceableWeight:
    """A weight of the base that adapters may replace: a trained head, a bias.

    Attributes:
        name: Its name in the model, and of the input that feeds it.
        original: The base's name for it.
        copied: Whether it is a copy, and the original is still there.
        swappable: Whether it can be fed at inference time.
        trained: Whether the value in the model is an adapter's, not the base's.
    """

    name: str
    original: str
    copied: bool
    swappable: bool
    trained: bool


@dataclass(frozen=True, slots=True)
class Widened:
    """A scale, zero point or bias of the base that was widened for the values of an adapter.

    Attributes:
        quantizer: Output of the QuantizeLinear whose range was widened.
        name: The constant that its nodes read now.
        original: The base's, which is still in the model.
    """

    quantizer: str
    name: str
    original: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every slot of a model and what is needed to get the base back.

    Attributes:
        fingerprint: Identity of the base model (`sha256:...`).
        ir_version: The base's IR version.
        canonical: Whether the base can come back byte for byte.
        inlined: Whether model-local functions were inlined before insertion.
        slots: The slots, in order of insertion.
        weights: Weights of the base that adapters may replace.
        inputs: Weights that the base, in an IR before 4, had to list as inputs: place and
            declaration in hexadecimal. From IR 4 on that would make them replaceable.
        widened: Constants of calibrated ranges that were widened.
    """

    fingerprint: str
    ir_version: int
    canonical: bool
    inlined: bool
    slots: tuple[Slot, ...]
    weights: tuple[ReplaceableWeight, ...] = ()
    inputs: tuple[tuple[int, str], ...] = ()
    widened: tuple[Widened, ...] = ()


def read_manifest(proto: onnx.ModelProto) -> Manifest | None:
    """Read the manifest of a model; None if it has no slots.

    Raises:
        ManifestError: If the record is damaged or of a newer format.
    """
    texts = [entry.value for entry in proto.metadata_props if entry.key == KEY]
    return _located(proto, manifest_from_text(texts[0])) if texts else None


def manifest_from_text(text: str) -> Manifest:
    """Read a manifest as it is written in a model's metadata.

    Raises:
        ManifestError: If the record is damaged or of a newer format.
    """
    try:
        manifest = _read(json.loads(text))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"the record of slots in the model is damaged ({error!r})",
            hint="another tool rewrote it; insert into the base model again",
        ) from error
    if len({slot.name for slot in manifest.slots}) != len(manifest.slots):
        raise ManifestError("two slots of the model have one name")
    return manifest


def _read(data: dict[str, Any]) -> Manifest:
    version = data["format"]
    if not isinstance(version, int) or version > FORMAT:
        raise ManifestError(
            f"the model's slots were written in format {version}; this version of "
            f"onnx-adapt reads up to {FORMAT}",
            hint="upgrade: pip install -U onnx-adapt",
        )
    base = data["base"]
    return Manifest(
        fingerprint=_typed(base["fingerprint"], str),
        ir_version=_typed(base["ir_version"], int),
        canonical=_typed(base["canonical"], bool),
        inlined=_typed(base["inlined"], bool),
        slots=tuple(_read_slot(item) for item in data["slots"]),
        weights=tuple(_read_weight(item) for item in data["weights"]),
        inputs=tuple(_read_input(i, text) for i, text in base["inputs"]),
        widened=tuple(_read_widened(item) for item in data.get("widened", ())),
    )


def _read_input(place: Any, declared: Any) -> tuple[int, str]:
    if not 0 <= _typed(place, int) < 2**31:
        raise ValueError(f"no input is at {place}")
    bytes.fromhex(_typed(declared, str))
    return place, declared


def _located(proto: onnx.ModelProto, manifest: Manifest) -> Manifest:
    """Trust the marks on nodes for where a slot is: a renamed If changes every path in it."""
    from onnx_adapt.model import walk

    places = {
        slot_of(node): scope.path
        for scope in walk.scopes(proto.graph)
        for node in scope.graph.node
        if node.metadata_props
    }
    slots = tuple(
        replace(slot, graph=places.get(slot.name, slot.graph)) for slot in manifest.slots
    )
    return replace(manifest, slots=slots)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"no field of ONNX holds {value}")
    if isinstance(value, str):
        value.encode()  # JSON can spell half a character, which no name can have
    return value


_MOST_AXES = 64
"""More than ONNX Runtime and numpy take; a shape of so many numbers is made from it."""

_KINDS = {"int": int, "str": str, "bool": bool}


def _read_slot(item: dict[str, Any]) -> Slot:
    values: dict[str, Any] = {}
    for field in fields(Slot):
        if field.name in ("parts", "window"):
            kind = str if field.name == "parts" else int
            values[field.name] = tuple(_typed(value, kind) for value in item[field.name])
        else:
            values[field.name] = _typed(item[field.name], _KINDS[str(field.type)])
    slot = Slot(**values)
    sizes = (slot.width, slot.source_width, slot.bottleneck, *slot.window)
    known = slot.dtype in DTYPES and slot.activation in ACTIVATIONS
    form = slot.axis in (-1, 1) and 0 <= slot.rank <= _MOST_AXES
    form = form and len(slot.window) in (0, 5 * (slot.rank - 2))
    if not known or not form or min(sizes) < 0:
        raise ValueError(f"slot {slot.name!r} has a value that no slot has")
    return slot


def _read_weight(item: dict[str, Any]) -> ReplaceableWeight:
    name, original = _typed(item["name"], str), _typed(item["original"], str)
    copied, swappable, trained = (
        bool(_typed(item[flag], bool)) for flag in ("copied", "swappable", "trained")
    )
    return ReplaceableWeight(name, original, copied, swappable, trained)


def _read_widened(item: dict[str, Any]) -> Widened:
    return Widened(*(_typed(item[field.name], str) for field in fields(Widened)))


def write_manifest(proto: onnx.ModelProto, manifest: Manifest | None) -> None:
    """Put the manifest into a model in place of the one it has; None takes it out."""
    for index in reversed(range(len(proto.metadata_props))):
        if proto.metadata_props[index].key == KEY:
            del proto.metadata_props[index]
    if manifest is None:
        return
    data: dict[str, object] = {
        "format": FORMAT,
        "base": {
            "fingerprint": manifest.fingerprint,
            "ir_version": manifest.ir_version,
            "canonical": manifest.canonical,
            "inlined": manifest.inlined,
            "inputs": manifest.inputs,
        },
        "slots": [_record(slot) for slot in manifest.slots],
        "weights": [_record(weight) for weight in manifest.weights],
    }
    if manifest.widened:
        data["widened"] = [_record(item) for item in manifest.widened]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    proto.metadata_props.add(key=KEY, value=text)


def _record(item: Slot | ReplaceableWeight | Widened) -> dict[str, object]:
    """The fields by name; they are flat, and `asdict` copies each of them, which shows."""
    return {each.name: getattr(item, each.name) for each in fields(item)}
