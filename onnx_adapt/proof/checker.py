"""What the ONNX checker and strict shape inference say of a model, without its weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from onnx_adapt.graph.index import index_model
from onnx_adapt.model import external_data, walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.payloads import token_index
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import slot_prefix


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that the checker or shape inference does not like.

    Attributes:
        asked: Which of the two.
        kind: What is wrong, without the names of what is around it.
        place: The base's node: a slot stands where the node before it does.
        words: What it said.
    """

    asked: str
    kind: str
    place: str
    words: str

    @property
    def fault(self) -> tuple[str, str, str]:
        """What makes it the same complaint in another model."""
        return self.asked, self.kind, self.place


def complaints(model: Model, slots: Sequence[Slot] = ()) -> list[Complaint]:
    """Everything the checker and strict shape inference have to say.

    Args:
        model: The model.
        slots: Its slots.
    """
    homes = {slot_prefix(slot.name): slot.node for slot in slots}
    asked = (("checker", _ask_checker), ("strict shape inference", _ask_inference))
    return [
        _complaint(what, words, homes)
        for what, ask in asked
        for words in _split(ask(model))
        if not _UNTOLD.search(words)
    ]


def new_complaints(base: Model, adapted: Model, slots: Sequence[Slot]) -> list[str]:
    """What is said of an adapted model and not, of the same place, of its base.

    A wrong record of the base can clash with a slot's nodes. It is no fault of theirs, so
    that what is new is asked again without such records.
    """
    new = _compared(base, adapted, slots)
    stale = index_model(base).stale_records() if new else {}
    if not stale:
        return new
    names = {address.rpartition(":")[2] for address in stale}
    return _compared(_unrecorded(base, names), _unrecorded(adapted, names), slots)


def _compared(base: Model, adapted: Model, slots: Sequence[Slot]) -> list[str]:
    known = {complaint.fault for complaint in complaints(base)}
    return [
        f"{complaint.asked}: {complaint.words}"
        for complaint in complaints(adapted, slots)
        if complaint.fault not in known
    ]


def _unrecorded(model: Model, names: Collection[str]) -> Model:
    """A model without recorded shapes of some tensors."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for scope in walk.scopes(proto.graph):
        for value in (*scope.graph.value_info, *scope.graph.output):
            if value.name in names:
                value.type.tensor_type.ClearField("shape")
    return replace(model, proto=proto)


def _ask_checker(model: Model) -> str:
    """What the checker says of a model; data on disk stands as an empty tensor."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in walk.tensors(proto):
        if token_index(tensor.raw_data) is not None or external_data.is_external(tensor):
            tensor.ClearField("raw_data")
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.dims[:] = [0]
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error)
    return ""


def _ask_inference(model: Model) -> str:
    try:
        onnx.shape_inference.infer_shapes(model.proto, check_type=True, strict_mode=True)
    except (
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        RuntimeError,
        ValueError,  # of a weight without an element type, among others
    ) as error:
        return str(error)
    return ""


_NODE = re.compile(
    r"op_type:(?P<op>[^,)]*)(, node name: (?P<name>.*?))?\)(?=: |$)"
    r"|[Nn]ame: (?P<checked>.*?) OpType: \S+"
)
_UNTOLD = re.compile(r"inferred=0\b")
"""ONNX knows the type of one branch of an If and not that of the other: no fault."""

_NAMED = re.compile(r"'[^']*'|\"[^\"]*\"|(?<=input )\S+|(?<=output )\S+")


def _split(words: str) -> Iterator[str]:
    """One complaint after the other: each begins with a node where several are told."""
    for part in re.split(r"(?:^|(?<=\s))(?=\(op_type:)", words):
        line = " ".join(part.split())
        if line and not line.endswith("Inference error(s):"):
            yield line


def _complaint(asked: str, words: str, homes: Mapping[str, str]) -> Complaint:
    found = _NODE.search(words)
    name = (found["name"] or found["checked"] or "") if found else ""
    place = homes.get(name.rpartition("/")[0], name)
    kind = _NAMED.sub("", _NODE.sub("", words))
    return Complaint(asked, " ".join(kind.split()), place, words)
