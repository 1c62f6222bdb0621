"""The record of slots that is written into a model.

It is one JSON document in the model's `metadata_props`, so any tool that reads ONNX
metadata can read it, ONNX Runtime included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from onnx_adapt.dtypes import DTYPES
from onnx_adapt.errors import ManifestError
from onnx_adapt.slot.activations import ACTIVATIONS
from onnx_adapt.slot.base_changes import Head, ReplaceableWeight, Unfused, Widened
from onnx_adapt.slot.names import weight_name
from onnx_adapt.slot.parts import ACTIVE, RowForm, part_of
from onnx_adapt.slot.record import (
    Extra,
    SameAs,
    absent,
    read_extra,
    read_input,
    read_object,
    to_text,
    write_extra,
    write_object,
)

if TYPE_CHECKING:
    import onnx

KEY = "onnx_adapt"
FORMAT = 2
"""Version of the record. Format 1, of onnx-adapt 0.1.0, has every key of a slot and is read
alike. Records of a newer format are refused; keys of its own that are not known are kept."""

SLOT_KEY = "pkg.onnx_adapt.slot"
"""Key in a node's `metadata_props`: the slot the node was inserted for."""
UNFUSED_KEY = "pkg.onnx_adapt.unfused"
"""The same: the fused node that it stands for a part of."""


def slot_of(node: onnx.NodeProto | onnx.ValueInfoProto) -> str:
    """Return the slot that a node, or a value_info entry, was inserted for, or ''."""
    for entry in node.metadata_props:
        if entry.key == SLOT_KEY:
            return str(entry.value)
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Nodes inserted at one site, with weights of their own unless it `shares` them.

    A field that is `absent(value)` is left out of the record where it has that value.

    Attributes:
        name: Unique in the model.
        graph: Path of the graph the slot is in (`main` or the way to a body).
        node: Name of the node that produces the site's tensor.
        tensor: The site's tensor.
        inner: The name the producer's output has now.
        output: The name of its output: `tensor`, or the `inner` of the slot stacked on it.
        source: The tensor the adapter reads; equal to `inner` unless chosen.
        width, source_width: Size of the feature axis of the site's tensor, and the source's.
        dtype: `float32`, `float16`, `bfloat16` or `float64`.
        axis: The feature axis: -1, or 1 for channels.
        rank: Number of axes of the tensor if the axis is 1 or it has `row_parts`, else 0.
        activation: Name of the activation between the projections.
        parts: Names of the weights, in the order of the formula.
        norm: Output of a normalisation of the base that is re-applied to the source, or ''.
        norm_after: What the slot's own normalisation wraps: `term`, `sum` or ''.
        module: PyTorch module path of the site, or ''.
        swappable: Whether the weights can be fed at inference time.
        bottleneck: Inner size if it is fixed; 0 if each adapter brings its own.
        window: Kernel, strides, pads and dilations of the down-projection, one after the
            other, for a convolution that looks at more than one position; else empty.
        plus: A tensor that is added to the source before anything else, or ''.
        batched: Whether one run can give each row of a batch another adapter.
        modules: The PyTorch modules that it adapts, where the site computes several side by
            side, in the order of their columns; else empty.
        columns: Where the columns of these modules start, and at last where they end.
        weight_shape: The shape of the weight that the slot is on; else empty.
        readers: The nodes that alone read what it makes, as addresses of their first outputs.
        shares: The slot whose weights it uses, as a further place of that; '' for its own.
        required: Whether its weights must be fed: the model has no default for them.
        by_token: Whether the input `active` says for each token how far its term counts.
        extra: Keys of its record that this version does not know, with JSON texts.
    """

    name: str
    graph: str = absent("main")
    node: str
    tensor: str
    inner: str
    output: str = absent(SameAs("tensor"))
    source: str = absent(SameAs("inner"))
    width: int
    source_width: int = absent(SameAs("width"))
    dtype: str
    axis: int = absent(-1)
    rank: int = absent(0)
    activation: str
    parts: tuple[str, ...]
    norm: str = absent("")
    norm_after: str = absent("")
    module: str = absent("")
    swappable: bool = absent(True)
    bottleneck: int = absent(0)
    window: tuple[int, ...] = ()
    plus: str = ""
    batched: bool = False
    modules: tuple[str, ...] = ()
    columns: tuple[int, ...] = ()
    weight_shape: tuple[int, ...] = ()
    readers: tuple[str, ...] = ()
    shares: str = ""
    required: bool = False
    by_token: bool = False
    extra: Extra = ()

    def __repr__(self) -> str:
        """Its name, its place and its width."""
        return f"<Slot {self.name!r} at {self.graph}:{self.tensor}, {self.width} wide>"

    @property
    def owner(self) -> str:
        """The name of the slot that owns its weights: its own, or that of the first place."""
        return self.shares or self.name

    @property
    def needs(self) -> tuple[object, ...]:
        """What decides the shapes and the meaning of its weights."""
        sizes = (self.width, self.source_width, self.bottleneck, self.window)
        behind = self.rank if self.axis == 1 else 0
        kind = (self.dtype, self.axis, behind, self.activation, self.norm_after)
        parts = (self.parts, self.modules, self.columns, self.weight_shape)
        return (*sizes, *kind, *parts, self.swappable, self.batched, self.by_token)

    def weight(self, part: str) -> str:
        """Return the name of one weight in the model, and of the input that feeds it."""
        return weight_name(self.owner, part)

    @property
    def on_weight(self) -> bool:
        """Whether it changes a weight that nodes read, not what a node makes."""
        return bool(self.weight_shape)

    @property
    def on_edge(self) -> bool:
        """Whether it changes what its readers read, and its tensor for no others."""
        return bool(self.readers)

    @property
    def symbol(self) -> str:
        """The symbolic dimension of the bottleneck: each set of weights has its own."""
        return f"r_{self.owner}"

    @property
    def row_forms(self) -> dict[str, RowForm]:
        """Its inputs that have a value for each row or token, by name."""
        forms = [ACTIVE] if self.by_token else []
        forms += [row for p in self.parts if self.batched and (row := part_of(p).row)]
        return {form.name: form for form in forms}

    @property
    def row_parts(self) -> tuple[str, ...]:
        """The names of its inputs that have a value for each row or token."""
        return tuple(self.row_forms)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of all its initializers: its weights and its inputs by row."""
        return tuple(self.weight(part) for part in (*self.parts, *self.row_parts))


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
        inputs: Weights that the base, in an IR before 4, had to list as inputs, which would
            make them replaceable later: place, and declaration in hexadecimal.
        widened: Constants of calibrated ranges that were widened.
        unfused: Fused nodes that were written out.
        heads: Heads that were added on outputs of the base.
        extra: Keys of the record that this version does not know, with JSON texts.
        base_extra: The same for the object `base` of the record.
    """

    fingerprint: str
    ir_version: int
    canonical: bool
    inlined: bool
    slots: tuple[Slot, ...]
    weights: tuple[ReplaceableWeight, ...] = ()
    inputs: tuple[tuple[int, str], ...] = ()
    widened: tuple[Widened, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    heads: tuple[Head, ...] = ()
    extra: Extra = ()
    base_extra: Extra = ()


@dataclass(frozen=True, slots=True)
class _Base:
    """The object `base` of the record, whose fields are also fields of `Manifest`."""

    fingerprint: str
    ir_version: int
    canonical: bool = absent(True)
    inlined: bool = absent(False)
    extra: Extra = ()


_AGAIN = "another tool rewrote it; insert into the base model again"
_LISTS = ("weights", "widened", "unfused", "heads")


def read_manifest(proto: onnx.ModelProto) -> Manifest | None:
    """Read the manifest of a model; None if it has no slots.

    Raises:
        ManifestError: If the record is damaged or of a newer format.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == KEY), None)
    return None if text is None else _located(proto, manifest_from_text(text))


@lru_cache(maxsize=4)  # a proof reads that of one model dozens of times
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
            f"the record of slots in the model is damaged ({error!r})", hint=_AGAIN
        ) from error
    _check_names(manifest.slots)
    return manifest


def _check_names(slots: Sequence[Slot]) -> None:
    by_name = {slot.name: slot for slot in slots}
    if len(by_name) != len(slots):
        raise ManifestError("two slots of the model have one name")
    for slot in slots:
        owner = by_name.get(slot.owner)
        if owner is None or owner.shares or owner.needs != slot.needs:
            why = f"slot {slot.name!r} cannot use the weights of {slot.owner!r}"
            told = f"the record of slots in the model is damaged: {why}"
            raise ManifestError(told, hint=_AGAIN)


def _read(data: dict[str, Any]) -> Manifest:
    version = data["format"]
    if not isinstance(version, int) or version > FORMAT:
        raise ManifestError(
            f"the model's slots were written in format {version}; this version of "
            f"onnx-adapt reads up to {FORMAT}",
            hint="upgrade: pip install -U onnx-adapt",
        )
    base = dict(data["base"])
    inputs = base.pop("inputs", ())
    known = read_object(_Base, base)
    listed = {key: data.get(key, ()) for key in _LISTS}
    return Manifest(
        fingerprint=known.fingerprint,
        ir_version=known.ir_version,
        canonical=known.canonical,
        inlined=known.inlined,
        slots=tuple(_read_slot(item) for item in data["slots"]),
        weights=tuple(read_object(ReplaceableWeight, item) for item in listed["weights"]),
        inputs=tuple(read_input(i, text) for i, text in inputs),
        widened=tuple(read_object(Widened, item) for item in listed["widened"]),
        unfused=tuple(read_object(Unfused, item) for item in listed["unfused"]),
        heads=tuple(read_object(Head, item) for item in listed["heads"]),
        extra=read_extra(data, ("format", "base", "slots", *_LISTS)),
        base_extra=known.extra,
    )


def _located(proto: onnx.ModelProto, manifest: Manifest) -> Manifest:
    """Take the graph of each slot from its marked nodes: renaming an If changes its paths."""
    from onnx_adapt.model import walk

    places = {
        slot_of(node): scope.path
        for scope in walk.scopes(proto.graph)
        for node in scope.graph.node
        if node.metadata_props
    }
    slots = tuple(
        slot if found == slot.graph else replace(slot, graph=found)
        for slot in manifest.slots
        for found in [places.get(slot.name, slot.graph)]
    )
    return replace(manifest, slots=slots)


_MOST_AXES = 64
"""A limit on `rank`, which sets the length of shapes; ONNX Runtime and numpy take fewer."""


def _read_slot(item: dict[str, Any]) -> Slot:
    slot = read_object(Slot, item)
    sizes = (slot.width, slot.source_width, slot.bottleneck, *slot.window, *slot.weight_shape)
    known = slot.dtype in DTYPES and slot.activation in ACTIVATIONS
    form = slot.axis in (-1, 1) and 0 <= slot.rank <= _MOST_AXES
    form = form and len(slot.window) in (0, 5 * (slot.rank - 2))
    if not known or not form or min(sizes) < 0:
        raise ValueError(f"slot {slot.name!r} has a value that no slot has")
    return slot


def write_manifest(proto: onnx.ModelProto, manifest: Manifest | None) -> None:
    """Replace the manifest of a model; None deletes it."""
    for index in reversed(range(len(proto.metadata_props))):
        if proto.metadata_props[index].key == KEY:
            del proto.metadata_props[index]
    if manifest is None:
        return
    rest = manifest.canonical, manifest.inlined, manifest.base_extra
    base = _Base(manifest.fingerprint, manifest.ir_version, *rest)
    data: dict[str, Any] = {
        "format": FORMAT,
        "base": write_object(base),
        "slots": [write_object(slot) for slot in manifest.slots],
    }
    if manifest.inputs:
        data["base"]["inputs"] = manifest.inputs
    lists = {key: [write_object(each) for each in getattr(manifest, key)] for key in _LISTS}
    data |= {key: records for key, records in lists.items() if records}
    proto.metadata_props.add(key=KEY, value=to_text(data | write_extra(manifest.extra)))
