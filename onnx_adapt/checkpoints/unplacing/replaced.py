"""Turn replaced weights of a base back into trained weights of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx_adapt.checkpoints.edits import Replacement, SlotEdit
from onnx_adapt.checkpoints.mapping import Graph
from onnx_adapt.checkpoints.modules.weights import read_weight
from onnx_adapt.checkpoints.placing.replacing import parameter_inputs
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.slot.base_changes import ReplaceableWeight


def replaced_edits(
    graph: Graph, records: Mapping[str, ReplaceableWeight], replaced: Mapping[str, Array]
) -> Iterator[SlotEdit]:
    """What the replaced weights of a base ask for.

    A library that trains a module's weight saves all of the module, so the base's own bias
    comes with it.

    Args:
        graph: The graph without slots.
        records: The records of the weights by name.
        replaced: The adapter's values by name.

    Raises:
        CheckpointError: If the graph does not tell which parameter one is.
    """
    for name, value in sorted(replaced.items()):
        item = _replaced_edit(graph, records[name], value)
        yield item
        bias = f"base.{item.edit.module}.bias"
        if name.endswith(".weight") and bias not in replaced:
            found = parameter_inputs(graph.finder, graph.survey, item.edit.module, "bias")
            for place in found[:1]:
                own = read_weight(graph.model, place.view, place.tensor).reshape(-1)
                yield SlotEdit(name, Replacement(item.edit.module, "bias", own))


def _replaced_edit(graph: Graph, weight: ReplaceableWeight, value: Array) -> SlotEdit:
    """What a replaced weight asks for, which is called `base.<module>.<parameter>`."""
    module, _, parameter = weight.name.removeprefix("base.").rpartition(".")
    inputs = parameter_inputs(graph.finder, graph.survey, module, parameter)
    if not inputs or inputs[0].tensor != weight.original:
        raise CheckpointError(
            f"the replaced weight {weight.name!r} is {weight.original!r} of the graph, which "
            "is no parameter of a module that it knows by its path",
            hint="give the base's weights with --base-weights if the graph lost its names",
        )
    if parameter == "bias":
        value = value.reshape(-1)
    return SlotEdit(
        weight.name,
        Replacement(module, parameter, value.T if inputs[0].transposed else value),
    )
