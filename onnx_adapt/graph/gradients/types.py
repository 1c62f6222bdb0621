"""Numbers of axes that shape inference alone does not find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx
from onnx import helper

from onnx_adapt.graph.endless_shapes import has_endless_shapes
from onnx_adapt.graph.gradients.backward import way_back
from onnx_adapt.graph.index import GraphView, ModelIndex, TensorType, read_type
from onnx_adapt.model import walk


def without_axes(
    index: ModelIndex, results: Sequence[str], weights: Sequence[str]
) -> list[str]:
    """The tensors between weights and results whose number of axes is not known."""
    found = []
    for node in way_back(index.main, results, weights).nodes:
        names = dict.fromkeys(filter(None, (*node.input, *node.output)))
        found += [name for name in names if index.main.type_of(name).shape is None]
    return list(dict.fromkeys(found))


def note_axes(index: ModelIndex, axes: Mapping[str, int]) -> None:
    """Note the numbers of axes of tensors of the main graph, in place."""
    for name, count in axes.items():
        known = index.main.type_of(name)
        index.main.types[name] = TensorType(known.elem_type, (None,) * count)


def infer_further(index: ModelIndex) -> None:
    """Infer types once more from those that are recorded or noted, in place.

    `index_model` trusts a model's own records for no tensor but the recorded one. Where an
    operator, such as an If with two shapes, stops inference, what is behind it has no shape.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(index.model.proto)
    for view, graph in _pairs(index, copy):
        del graph.value_info[:]
        outputs = {value.name for value in graph.output}
        graph.value_info.extend(
            helper.make_tensor_value_info(name, known.elem_type, known.shape)
            for name in view.producers
            if (known := view.type_of(name)).shape is not None
            and known.elem_type
            and name not in outputs
        )
    if has_endless_shapes(copy):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return  # a rule that needs a shape says so
    for view, graph in _pairs(index, inferred):
        for value in (*graph.value_info, *graph.output):
            known = view.type_of(value.name)
            if known.shape is None and value.name in view.producers:
                found = read_type(value)
                kind = known.elem_type or found.elem_type
                view.types[value.name] = TensorType(kind, found.shape)


def _pairs(
    index: ModelIndex, proto: onnx.ModelProto
) -> Iterator[tuple[GraphView, onnx.GraphProto]]:
    """The views of an index, each with the same graph of a copy of its model."""
    for scope in walk.scopes(proto.graph):
        yield index.views[scope.path], scope.graph
