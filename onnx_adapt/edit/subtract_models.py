"""Subtract a model from a fine-tuned one with the same graph, tensor by tensor.

A weight that is a layer's own becomes a slot of low rank on each call of it, where that is
smaller. Every other tensor of floats (biases, norms, packed weights) is replaced, which is
exact wherever it is read. For example `fc.weight` of 768 x 768 becomes LoRA of rank 8 on the
MatMul that reads it; `fc.bias` and `norm.weight` become replaced weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import onnx

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import LowRank
from onnx_adapt.checkpoints.load import Checkpoint
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.inner_weights import attention_weights
from onnx_adapt.checkpoints.modules.weights import read_matrix
from onnx_adapt.checkpoints.placing.low_rank import place_low_rank
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.sharing import share_weights
from onnx_adapt.dtypes import FLOATS, Array
from onnx_adapt.edit.differences import Wanted, check_numbers, low_rank, refuse_wide
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.index import GraphView, ModelIndex, attribute, index_model, text
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.names import free_name, reserved_names
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.graph.sites import Survey, survey_model
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.model.tensors import read_tensor
from onnx_adapt.slot.base_changes import ReplaceableWeight
from onnx_adapt.slot.places import owners


@dataclass(frozen=True, slots=True, eq=False)
class Changed:
    """A stored tensor that has another value in the tuned model.

    Attributes:
        view: The graph that stores it.
        name: Its name.
        stored: The base's tensor.
        tuned: The tuned model's value.
        calls: The layers whose weight it is, where nothing else reads it.
    """

    view: GraphView
    name: str
    stored: onnx.TensorProto
    tuned: Array
    calls: tuple[LayerCall, ...]

    @property
    def label(self) -> str:
        """What to call it: its name without `.weight` or `.bias`."""
        head, _, parameter = self.name.rpartition(".")
        return head if head and parameter in ("weight", "bias") else self.name


def subtract_models(base: Model, tuned: Model, wanted: Wanted, name: str) -> Checkpoint:
    """The adapter that makes a model of a base that a fine-tuned one of the same graph is.

    Raises:
        CheckpointError: If the graphs differ, a value changed that no adapter holds, or
            nothing did.
    """
    refuse_other_graph(base, tuned)
    survey = survey_model(base)
    names: dict[str, str] = {}
    taken = reserved_names(survey.index)
    # The finder is asked for nothing: the calls and tensors are known.
    placement = Placement(
        base, survey, ByName(survey, {}, attention_weights(survey, [])), names, taken
    )
    plans: list[ReplacementPlan] = []
    replaced: dict[str, Array] = {}
    losses: dict[str, float] = {}
    widest = 0
    for changed in _changes(base, tuned, survey):
        edits = _low_rank_edits(base, changed, wanted, survey)
        widest = max([widest, *(min(call.sizes) for call in changed.calls)])
        for call, edit, loss in edits or ():
            names[edit.module] = edit.module
            place_low_rank(placement, edit, call)
            losses[edit.module] = loss
        if edits is None:
            plan = _replacement(changed, survey, {p.weight.name for p in plans})
            plans.append(plan)
            replaced[plan.weight.name] = changed.tuned
    if not placement.slots and not plans:
        raise CheckpointError(
            f"{tuned.label} has the weights of {base.label}: there is nothing to subtract",
            hint="was the base given twice?",
        )
    refuse_wide(wanted, widest)
    share_weights(placement)
    identity = fingerprint(base)
    slots = tuple(placement.slots)
    activations = {slot.name: slot.activation for slot in owners(slots)}
    adapter = Adapter(name, placement.weights, replaced, activations, identity)
    return Checkpoint(adapter, slots, tuple(plans), identity, losses=losses)


def refuse_other_graph(base: Model, tuned: Model) -> None:
    """Refuse two models whose graphs differ in more than the values of stored tensors.

    Raises:
        CheckpointError: With the first difference.
    """
    for one, other in zip_longest(_bare(base.proto), _bare(tuned.proto)):
        if one != other:
            what = (one or other or ("the graph", b""))[0]
            raise CheckpointError(
                f"{tuned.label} is not of the graph of {base.label}: they differ in {what}",
                hint="export the base and the tuned model in the same way, with the same "
                "versions; or give their weights files and --for MODEL",
            )


def _bare(proto: onnx.ModelProto) -> Iterator[tuple[str, bytes]]:
    """Everything that decides what a model computes but the values of its stored tensors."""
    for scope in walk.scopes(proto.graph):
        yield f"the graph {scope.path!r}", b""
        for kind, values in (("input", scope.graph.input), ("output", scope.graph.output)):
            for value in values:
                yield f"{kind} {value.name!r}", _plain(value)
        for tensor in scope.graph.initializer:
            yield f"tensor {tensor.name!r} {list(tensor.dims)}", _header(tensor)
        for node in scope.graph.node:
            bare = onnx.NodeProto()
            bare.CopyFrom(node)
            for item in bare.attribute:
                if node.op_type == "Constant" and item.HasField("t"):
                    item.t.ParseFromString(_header(item.t))
                item.ClearField("g")
                del item.graphs[:]
            label = text(node.name) or ", ".join(map(text, node.output))
            yield f"node {label!r}", _plain(bare)
    for function in proto.functions:
        yield f"function {function.name!r}", _plain(function)


def _plain(item: onnx.NodeProto | onnx.ValueInfoProto | onnx.FunctionProto) -> bytes:
    """The bytes of an item without words for people and tools."""
    bare = type(item)()
    bare.CopyFrom(item)
    bare.ClearField("doc_string")
    del bare.metadata_props[:]
    return bytes(bare.SerializeToString(deterministic=True))


def _header(tensor: onnx.TensorProto) -> bytes:
    header = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return bytes(header.SerializeToString())


def _changes(base: Model, tuned: Model, survey: Survey) -> Iterator[Changed]:
    """The stored tensors whose values differ.

    Raises:
        CheckpointError: If one is no float, or holds NaN or infinity.
    """
    others: ModelIndex = index_model(tuned)
    calls = _layer_calls(survey)
    for path, view in survey.index.views.items():
        for name, tensor in view.constants.items():
            value = read_tensor(tuned, others.views[path].constants[name])
            if np.array_equal(
                read_tensor(base, tensor), value, equal_nan=value.dtype.kind == "f"
            ):
                continue
            if tensor.data_type not in FLOATS:
                raise CheckpointError(
                    f"tensor {name!r} differs, and it holds no floats (are the models "
                    "quantised?)",
                    hint="subtract the models in floats, before they are quantised",
                )
            if name in view.outputs:
                raise CheckpointError(
                    f"tensor {name!r} differs, and is an output of the graph"
                )
            check_numbers(name, value)
            yield Changed(view, name, tensor, value, tuple(calls.get((path, name), ())))


_MOVING = ("Transpose", "Cast", "Identity")
"""Operators through which a layer may read its weight, so that it is still its own."""


def _layer_calls(survey: Survey) -> dict[tuple[str, str], list[LayerCall]]:
    """The calls of layers by the tensor that is their weight, where only they read it."""
    found: dict[tuple[str, str], list[LayerCall]] = {}
    counted: dict[tuple[str, str], int] = {}
    for view in survey.index.views.values():
        for node in view.nodes:
            if not is_module_call(view, node):
                continue
            tensor = str(node.input[OPERATORS[node.op_type].weight])
            while (made := view.producer(tensor)) and made[1].op_type in _MOVING:
                tensor = str(made[1].input[0])
            home, call = view.home(tensor), survey.call(view, node)
            if home is not None and call is not None and tensor in home.constants:
                found.setdefault((home.scope.path, tensor), []).append(call)
    for path, name in found:
        counted[path, name] = _count_ends(survey, path, name)
    return {key: calls for key, calls in found.items() if len(calls) == counted[key]}


def _count_ends(survey: Survey, path: str, name: str) -> int:
    """How many inputs read a stored tensor in the end, through Transpose and the like."""
    ends = 0
    waiting = [(survey.index.views[path], name)]
    while waiting:
        home, tensor = waiting.pop()
        for view, node in _readers(survey, home, tensor):
            if node.op_type in _MOVING and len(node.output) == 1:
                waiting.append((view, str(node.output[0])))
            else:
                ends += list(node.input).count(tensor)
    return ends


def _readers(
    survey: Survey, home: GraphView, tensor: str
) -> Iterator[tuple[GraphView, onnx.NodeProto]]:
    """The nodes that read a tensor of a graph, those in bodies included."""
    for view in survey.index.views.values():
        if view.home(tensor) is home:
            yield from ((view, node) for node in view.nodes if tensor in node.input)


def _low_rank_edits(
    base: Model, changed: Changed, wanted: Wanted, survey: Survey
) -> list[tuple[LayerCall, LowRank, float]] | None:
    """LoRA for each call of a layer whose weight changed; None if it is to be replaced."""
    found: list[tuple[LayerCall, LowRank, float]] = []
    dtype = FLOATS[changed.stored.data_type]
    for call in changed.calls:
        if not _takes_low_rank(call):
            return None
        before = read_matrix(base, call)
        after = _as_the_call_reads(call, changed, before.shape)
        embeds = OPERATORS[call.node.op_type].embeds
        difference = (after - before).T if embeds else after - before
        edit = low_rank(_name(call, changed, survey), difference, wanted, dtype)
        if edit is None:
            return None
        found.append((call, *edit))
    return found or None


def _takes_low_rank(call: LayerCall) -> bool:
    """Whether LoRA on a call is exactly a change of its weight."""
    operator, node = OPERATORS[call.node.op_type], call.node
    weight = find_weight(call.view, call.weight)
    if weight is None or weight.elem_type not in FLOATS or call.activation or not call.source:
        return False
    if not operator.convolves:
        return len(weight.dims) == 2
    lists = {item.name: list(item.ints) for item in node.attribute}
    dilated = any(step != 1 for step in lists.get("dilations", ()))
    automatic = any(i.name == "auto_pad" and i.s != b"NOTSET" for i in node.attribute)
    return (
        node.op_type == "Conv"
        and not (dilated or automatic)
        and attribute(node, "group", 1) == 1
    )


def _as_the_call_reads(call: LayerCall, changed: Changed, shape: tuple[int, ...]) -> Array:
    """The tuned weight in the layout in which `read_matrix` gives the base's."""
    value = changed.tuned.astype(np.float64)
    tensor = call.weight
    while tensor != changed.name:
        made = call.view.producer(tensor)
        assert made is not None
        value = value.T if made[1].op_type == "Transpose" else value
        tensor = str(made[1].input[0])
    value = value.T if call.stored_in_out else value
    if call.node.op_type == "Gemm":
        value = value * next((a.f for a in call.node.attribute if a.name == "alpha"), 1.0)
    assert value.shape == shape
    return value


def _name(call: LayerCall, changed: Changed, survey: Survey) -> str:
    """What to call a slot: the module that the call is of, or the weight."""
    index = next(i for i, node in enumerate(call.view.nodes) if node is call.node)
    scope = survey.modules.scopes[call.view.scope.path][index]
    return scope or changed.label


def _replacement(changed: Changed, survey: Survey, taken: set[str]) -> ReplacementPlan:
    """The plan to replace a stored tensor wherever it is read."""
    readers = tuple(
        (view.scope.path, next(i for i, n in enumerate(view.nodes) if n is node), position)
        for view, node in _readers(survey, changed.view, changed.name)
        for position, read in enumerate(node.input)
        if read == changed.name
    )
    name = free_name(f"base.{changed.name}", taken)
    graph = changed.view.scope.graph
    alone = changed.view is survey.index.main and changed.name not in changed.view.producers
    given = any(value.name == changed.name for value in graph.input)
    default = onnx.TensorProto()
    default.CopyFrom(changed.stored)
    default.name = name
    weight = ReplaceableWeight(
        name=name,
        original=changed.name,
        copied=not alone or given,
        swappable=True,
        trained=False,
    )
    return ReplacementPlan(weight, default, readers)
