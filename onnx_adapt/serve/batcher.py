"""The model as a server runs it: requests are checked, joined into batches and taken apart."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import AdaptError, RequestError, RunError
from onnx_adapt.ort import onnxruntime
from onnx_adapt.serve.protocol import Spec
from onnx_adapt.session.adapter_session import AdapterSession
from onnx_adapt.session.batches import BatchAxis
from onnx_adapt.session.ort_adapter import as_ort_value

_DATATYPES = {
    "tensor(bool)": "BOOL",
    **{f"tensor(uint{bits})": f"UINT{bits}" for bits in (8, 16, 32, 64)},
    **{f"tensor(int{bits})": f"INT{bits}" for bits in (8, 16, 32, 64)},
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}


@dataclass(frozen=True, slots=True)
class Job:
    """A request as the batcher takes it.

    Attributes:
        feeds: Arrays by input name.
        outputs: The names of the outputs wanted.
        adapter: None, a name, or a blend, of what is loaded in the session.
    """

    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    adapter: str | Mapping[str, float] | None = None


Result = dict[str, Array] | AdaptError
"""Outputs by name, or what went wrong."""


class Batcher:
    """An `AdapterSession` that takes many requests at once.

    Requests are joined into one batch only where a row's outputs are its own: where every
    input has a batch axis, by its symbolic dimension's name or because the user says so.

    Args:
        model: The path of the adapted model.
        batch_axis: Which axis the batch is; by default the one whose symbolic dimension
            has `batch` in its name.
        threads: How many threads one run may use; by default ONNX Runtime decides.
        provider: The execution provider; by default the CPU.
        max_rows: The most rows that a request can have.

    Raises:
        RunError: If the model or the provider does not load, or the protocol has no word for
            the model's types.
    """

    def __init__(
        self,
        model: str,
        *,
        batch_axis: BatchAxis = None,
        threads: int = 0,
        provider: str = "",
        max_rows: int | None = None,
    ) -> None:
        options = onnxruntime().SessionOptions()
        options.intra_op_num_threads = threads
        self.session = AdapterSession(
            model,
            providers=provider or None,
            session_options=options,
            batch_axis=batch_axis,
        )
        self.inputs = {name: _spec(item) for name, item in self.session.inputs.items()}
        self.outputs = {name: _spec(item) for name, item in self.session.outputs.items()}
        self._shared = _shared({name: i.shape for name, i in self.session.inputs.items()})
        self._max_rows = max_rows
        self._axes = self.session.batch_axes
        declared = {**self.session.inputs, **self.session.outputs}
        axes = {**self._axes.inputs, **self._axes.outputs}
        said = batch_axis is not None
        self._batched = {
            name: axis is not None and self._open(declared[name].shape[axis:], said=said)
            for name, axis in axes.items()
        }
        specs = [*self.inputs.values(), *self.outputs.values()]
        self._as_ort_values = any(spec.datatype == "BF16" for spec in specs)

    @staticmethod
    def _open(dims: Sequence[int | str | None], *, said: bool) -> bool:
        """Whether the first axis takes any number of rows, and rows are what it is made of."""
        if not dims or isinstance(dims[0], int):
            return False
        return said or "batch" in str(dims[0]).lower()

    def check(
        self,
        feeds: Mapping[str, Array],
        datatypes: Mapping[str, str],
        outputs: Sequence[str],
    ) -> None:
        """Refuse a request that the model cannot take.

        Raises:
            RequestError: With what is missing, unknown, or of another type or shape.
        """
        for name in feeds.keys() ^ self.inputs.keys():
            wrong = "is missing" if name in self.inputs else "is no input of the model"
            raise RequestError(f"{name!r} {wrong}", hint=f"it has {', '.join(self.inputs)}")
        for name in outputs:
            if name not in self.outputs:
                raise RequestError(
                    f"{name!r} is no output of the model",
                    hint=f"it has {', '.join(self.outputs)}",
                )
        for name, array in feeds.items():
            spec = self.inputs[name]
            if datatypes[name] != spec.datatype:
                raise RequestError(f"input {name!r} is {spec.datatype}, not {datatypes[name]}")
            fits = len(array.shape) == len(spec.shape) and all(
                want in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
            )
            if not fits:
                raise RequestError(
                    f"input {name!r} has shape {list(spec.shape)}, not {list(array.shape)}",
                    hint="-1 takes any number",
                )
        self._refuse_unequal(feeds)
        rows = self.rows(feeds)
        if self._max_rows is not None and rows is not None and rows > self._max_rows:
            raise RequestError(
                f"the batch has {rows} rows; the most is {self._max_rows}",
                hint="send it in parts, or raise --max-batch-size",
            )

    def _refuse_unequal(self, feeds: Mapping[str, Array]) -> None:
        """Refuse sizes that differ where the model has one symbol for them."""
        for symbol, places in self._shared.items():
            first, axis = places[0]
            expected = feeds[first].shape[axis]
            for name, axis in places:
                if (size := feeds[name].shape[axis]) != expected:
                    raise RequestError(
                        f"{symbol!r} is {expected} in {first!r} and {size} in {name!r}",
                        hint="they have one size in the model",
                    )

    def rows(self, feeds: Mapping[str, Array]) -> int | None:
        """How many rows the feeds have, or None if that cannot be said."""
        counts = {
            feeds[name].shape[axis]
            for name, axis in self._axes.inputs.items()
            if axis is not None
        }
        return counts.pop() if len(counts) == 1 else None

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        """Run some requests, in as few batches as their shapes allow."""
        if len(jobs) == 1:
            return [self._run_alone(jobs[0])]
        results: list[Result | None] = [None] * len(jobs)
        groups: dict[object, list[int]] = {}
        for i, job in enumerate(jobs):
            groups.setdefault(self._kind(job, i), []).append(i)
        for members in groups.values():
            group = [jobs[i] for i in members]
            joined = self._run_joined(group) if len(group) > 1 else None
            for place, i in enumerate(members):
                results[i] = joined[place] if joined else self._run_alone(jobs[i])
        return [result for result in results if result is not None]

    def _kind(self, job: Job, number: int) -> object:
        """What jobs that can be joined have in common; for others, nothing."""
        apart = self._as_ort_values or not self.rows(job.feeds)
        if apart or not all(self._batched[name] for name in [*job.feeds, *job.outputs]):
            return number
        shapes = []
        for name, array in sorted(job.feeds.items()):
            axis = self._axes.inputs[name] or 0
            shapes.append((name, array.shape[:axis], array.shape[axis + 1 :]))
        return tuple(shapes), job.outputs

    def _run_joined(self, jobs: Sequence[Job]) -> list[Result] | None:
        """One batch of all rows; None if that does not work, and each must run alone."""
        counts = [self.rows(job.feeds) or 0 for job in jobs]
        feeds = {
            name: np.concatenate([job.feeds[name] for job in jobs], self._axes.inputs[name])
            for name in jobs[0].feeds
        }
        adapters = [job.adapter for job, n in zip(jobs, counts, strict=True) for _ in range(n)]
        try:
            found = self.session.run(feeds, adapters, jobs[0].outputs)
        except AdaptError:  # one bad request must not fail the others
            return None
        ends = np.cumsum(counts)
        parts: list[Result] = [{} for _ in jobs]
        for name, array in found.items():
            axis = self._axes.outputs[name] or 0
            if array.ndim <= axis or array.shape[axis] != ends[-1]:
                return None
            for part, piece in zip(parts, np.split(array, ends[:-1], axis), strict=True):
                part[name] = piece  # type: ignore[index]
        return parts

    def _run_alone(self, job: Job) -> Result:
        try:
            if not self._as_ort_values:
                return self.session.run(job.feeds, job.adapter, job.outputs)
            fed = {name: as_ort_value(array) for name, array in job.feeds.items()}
            found = self.session.run_with_ort_values(fed, job.adapter, job.outputs)
            return {name: _array(value) for name, value in found.items()}
        except AdaptError as error:
            return error


def _shared(shapes: Mapping[str, Sequence[Any]]) -> dict[str, list[tuple[str, int]]]:
    """The symbols that several axes of inputs have, and the name and number of each axis."""
    places: dict[str, list[tuple[str, int]]] = {}
    for name, shape in shapes.items():
        for axis, dim in enumerate(shape):
            if isinstance(dim, str):
                places.setdefault(dim, []).append((name, axis))
    return {symbol: found for symbol, found in places.items() if len(found) > 1}


def _spec(item: Any) -> Spec:
    """What ONNX Runtime says of an input or output, in the protocol's words."""
    if item.type not in _DATATYPES:
        raise RunError(
            f"{item.name!r} is {item.type}, for which the Open Inference Protocol has no word",
            hint="cast it inside the model",
        )
    shape = tuple(dim if isinstance(dim, int) else -1 for dim in item.shape)
    return Spec(item.name, _DATATYPES[item.type], shape)


def _array(value: Any) -> Array:
    """An OrtValue as an array; bfloat16 included, which ONNX Runtime's own `numpy` lacks."""
    if value.data_type() != "tensor(bfloat16)":
        return np.asarray(value.numpy())
    shape = value.shape()
    bits = (ctypes.c_uint16 * math.prod(shape)).from_address(value.data_ptr())
    return np.array(bits, np.uint16).view(DTYPES["bfloat16"]).reshape(shape)
