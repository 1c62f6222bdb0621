"""Which stored tensors are equal: simplifiers copy a weight for each of its readers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import onnx

from onnx_adapt.errors import ModelFileError
from onnx_adapt.model.file import Model
from onnx_adapt.model.payloads import LARGE
from onnx_adapt.model.tensors import payload_of, read_payload, read_tensor

_QUANTISED = re.compile(r"(?P<name>.+)_(quantized|Bnb4|Q[248])")
"""How onnxruntime.quantization calls a weight after the one that it quantised."""


@dataclass(slots=True)
class ValueNumbers:
    """Numbers for the stored tensors of a model: equal ones have the same.

    A tensor is read whole only where another of its shape begins with the same bytes. For
    example, of `a`, `b` and `c` that are all `(768, 768)`, `a` and `c` begin alike and are
    equal in all of their bytes, while `b` begins otherwise: they get the numbers 0, 1 and 0,
    and `b` is never read whole.

    Attributes:
        model: The model.
    """

    model: Model
    _numbers: dict[int, int] = field(default_factory=dict)
    _alike: dict[object, list[onnx.TensorProto]] = field(default_factory=dict)

    def of(self, tensor: onnx.TensorProto) -> int:
        """The number of a tensor's value."""
        number = self._numbers.get(id(tensor))
        if number is None and (original := self._original(tensor)) is not None:
            number = self._numbers[id(tensor)] = self.of(original)
        if number is None:
            alike = self._alike.setdefault(self._beginning(tensor), [])
            twin = next((other for other in alike if self._equal(tensor, other)), None)
            number = len(self._numbers) if twin is None else self._numbers[id(twin)]
            self._numbers[id(tensor)] = number
            alike.append(tensor)
        return number

    def _original(self, tensor: onnx.TensorProto) -> onnx.TensorProto | None:
        """The float tensor that a quantiser made a tensor of, where something else reads it.

        A weight that two layers share through an Identity is quantised for one of them.
        """
        match = _QUANTISED.fullmatch(tensor.name)
        stored = self.model.proto.graph.initializer if match else ()
        return next((other for other in stored if match and other.name == match["name"]), None)

    def _beginning(self, tensor: onnx.TensorProto) -> object:
        """What equal tensors have in common at least, and is cheap to read."""
        head = b""
        try:
            place = payload_of(self.model, tensor)
            head = b"" if place is None else read_payload(place, LARGE)
        except ModelFileError:
            pass  # a graph may be looked at without its data
        return tensor.data_type, tuple(tensor.dims), head

    def _equal(self, one: onnx.TensorProto, other: onnx.TensorProto) -> bool:
        try:
            first, second = (read_tensor(self.model, tensor) for tensor in (one, other))
        except ModelFileError:
            return False  # what cannot be read is not known to be the same
        return first.tobytes() == second.tobytes()
