"""The models of ONNX's own backend tests, and what becomes of each that takes slots."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from slot_models import session

import onnx_adapt as oa
from onnx_adapt.errors import AdaptError, UnprovableError
from onnx_adapt.ort import failures

DATA = Path(onnx.__file__).parent / "backend/test/data"
FLOATS = {1, 10, 11, 16}
_MOST = 6


@dataclass(frozen=True, slots=True)
class Case:
    """A model of the backend tests.

    Attributes:
        name: The test's name.
        proto: The model.
        inputs: What the test feeds, in the order of the model's inputs.
    """

    name: str
    proto: onnx.ModelProto
    inputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case.

    Attributes:
        name: The test's name.
        kind: `adapted`; `still`: all is proven but that a slot moves an output; `infinite`:
            there are infinities where a slot is; `refused`; `unproven`: ONNX Runtime does
            not run the base; `wrong`.
        reason: Why it was not adapted, or what is wrong.
        slots: The number of slots.
    """

    name: str
    kind: str
    reason: str = ""
    slots: int = 0


def node_cases(modules: Sequence[str] = ()) -> list[Case]:
    """The tests of single operators, which ONNX makes when it is asked: of some, or all.

    Args:
        modules: Modules of `onnx.backend.test.case.node`, such as `gemm`.
    """
    from onnx.backend.test.case import node

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of infinities that the tests want
        if not modules:
            return [_case(test) for test in node.collect_testcases(None)]
        before = len(node._NodeTestCases)
        for module in modules:
            importlib.import_module(f"{node.__name__}.{module}")
        return [_case(test) for test in node._NodeTestCases[before:]]


def _case(test: Any) -> Case:
    return Case(test.name, test.model, tuple(map(_array, test.data_sets[0][0])))


def stored_cases() -> Iterator[Case]:
    """The tests that are files: converted from PyTorch, simple ones, known networks."""
    for path in sorted(DATA.glob("*/*/model.onnx")):
        proto = onnx.load(path)
        yield Case(path.parent.name, proto, tuple(_inputs(path.parent, proto.graph)))
    for path in sorted((DATA / "light").glob("*.onnx")):
        yield Case(path.stem, onnx.load(path), ())


def _inputs(folder: Path, graph: onnx.GraphProto) -> Iterator[Any]:
    for i, value in enumerate(graph.input):
        path = folder / "test_data_set_0" / f"input_{i}.pb"
        if value.type.HasField("tensor_type") and path.exists():
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            yield numpy_helper.to_array(tensor)


def _array(value: Any) -> Any:
    """What ONNX Runtime takes: arrays, where the tests have scalars and tensors as well."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def has_float_output(proto: onnx.ModelProto) -> bool:
    """Whether an output is a float tensor of a type that slots have."""
    return any(value.type.tensor_type.elem_type in FLOATS for value in proto.graph.output)


def _kind(failed: dict[str, str]) -> str:
    """What a report says that did not pass.

    Nothing moves an output that is empty, or that weights of zero lead to; and where the
    base computes with infinities, or a slot makes it do so, nothing can be compared.
    """
    if "the base itself gives different outputs" in failed.get("off", ""):
        return "unproven"
    if failed.keys() - {"on", "effect"}:
        return "wrong"
    if any(f"{what} away" in failed.get("on", "") for what in ("nan", "inf")):
        return "infinite"
    reached = "on" not in failed or "no slot is reached" in failed["on"]
    return "still" if reached else "wrong"


def _known_to_numpy(value: Any) -> bool:
    return not isinstance(value, np.ndarray) or value.dtype.type.__module__ == "numpy"


def _runs(proto: onnx.ModelProto, feeds: dict[str, Any]) -> bool:
    try:
        session(proto).run(None, feeds)
    except (*failures(), RuntimeError):
        return False
    return True


def attempt(case: Case) -> Outcome:
    """Put slots after what can take one, take them out, and prove the model between."""
    before = case.proto.SerializeToString()
    base = oa.Model(case.proto)
    try:
        sites = oa.find_sites(base, all_tensors=True)
        places = [site.address for site in sites if site.refused is None][:_MOST]
        if not places:
            reasons = {site.refused or "" for site in sites}
            return Outcome(
                case.name, "refused", "; ".join(sorted(reasons)) or "no float tensor"
            )
        adapted = oa.insert(base, after=places)
    except AdaptError as error:
        return Outcome(case.name, "refused", error.message)
    if oa.remove(adapted).proto.SerializeToString() != before:
        return Outcome(case.name, "wrong", "the base does not come back byte for byte")
    feeds = dict(zip((v.name for v in case.proto.graph.input), case.inputs, strict=False))
    if not all(_known_to_numpy(value) for value in feeds.values()):
        feeds = {}  # verify makes inputs up
    try:
        report = oa.verify(base, adapted, inputs=feeds or None)
    except UnprovableError as error:
        return Outcome(case.name, "unproven", error.message)
    except AdaptError as error:
        kind = "wrong" if _runs(case.proto, feeds) else "unproven"
        return Outcome(case.name, kind, error.message)
    if not report.passed:
        failed = {c.name: c.detail for c in report.checks if not c.passed}
        reason = "; ".join(f"{name}: {detail}" for name, detail in failed.items())
        return Outcome(case.name, _kind(failed), reason, len(places))
    return Outcome(case.name, "adapted", slots=len(places))
