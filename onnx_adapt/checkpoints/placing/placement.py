"""The placement of a checkpoint in one graph: what it works with, and the slots so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from onnx_adapt.checkpoints.modules.calls import ParameterInput
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.checkpoints.modules.names import beginnings
from onnx_adapt.checkpoints.placing.joining import joined_apart, joined_beside
from onnx_adapt.dtypes import DTYPES, Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.fused_layers import inside_layer
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import LayerCall, Packing
from onnx_adapt.graph.names import free_name
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.graph.site import Site
from onnx_adapt.graph.sites import Survey
from onnx_adapt.model.file import Model
from onnx_adapt.slot.form import (
    Form,
    InputTarget,
    WeightTarget,
    new_input_slot,
    new_slot,
    new_weight_slot,
)
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.parts import PARTS, in_order
from onnx_adapt.slot.weights import bottleneck_of, part_shape


class ModuleFinder(Protocol):
    """Finds modules in a graph by their paths there."""

    def known(self) -> list[str]:
        """The paths of all modules."""

    def stored(self) -> list[str]:
        """The paths of modules that are known only from the name of a weight."""

    def calls(self, module: str, *, called: bool = True) -> list[LayerCall]:
        """The calls of a module; if not `called`, layers that only read its weights count."""

    def inner_weights(self, module: str) -> Sequence[InnerWeight]:
        """The weights of a module inside operators, one for each node that computes it."""

    def parameter(self, name: str) -> Array | None:
        """The base's value of a parameter, where values tell what it is in the graph."""

    def norm_inputs(self, module: str, parameter: str) -> list[ParameterInput]:
        """Where a parameter of a normalisation enters the graph."""

    def output(self, module: str) -> list[tuple[GraphView, str]]:
        """The tensors that a module passes to the rest of the model, each with its graph."""

    def missing(self, module: str) -> CheckpointError:
        """The error that says why a module has no calls."""


_PLAIN = Form()


@dataclass(slots=True)
class Placement:
    """The placement of a checkpoint in one graph: what it works with, and the slots so far.

    Attributes:
        model: The model.
        survey: Its survey.
        finder: Finds the modules in the graph.
        names: The graph's path for each module of the checkpoint.
        taken: Names that slots already have.
        slots: The slots so far.
        weights: Their weights, by slot and part.
        wanted: The name that each slot was to have, before it was made unique.
        beside: The slots on layers that compute several modules, by what they read and write.
        on_weights: The slots on weights inside operators, by graph, name and readers of the
            weight.
        full_names: Whether slots are called after the checkpoint's paths, not the graph's.
        library: The library that saved the checkpoint, as in `Saved`.
        plans: The weights of the base that are replaced.
        replaced: What replaces them, by the names of the plans.
    """

    model: Model
    survey: Survey
    finder: ModuleFinder
    names: Mapping[str, str]
    taken: set[str]
    slots: list[Slot] = field(default_factory=list)
    weights: dict[str, dict[str, Array]] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    beside: dict[tuple[str, str], str] = field(default_factory=dict)
    on_weights: dict[tuple[str, str, tuple[str, ...]], str] = field(default_factory=dict)
    full_names: bool = False
    library: str = ""
    plans: list[ReplacementPlan] = field(default_factory=list)
    replaced: dict[str, Array] = field(default_factory=dict)

    def inner_weights(self, module: str) -> Sequence[InnerWeight]:
        """The weights of a module of the checkpoint inside operators; empty if it has none.

        Raises:
            CheckpointError: If it is inside an operator that takes no adapter.
        """
        return self.finder.inner_weights(self.names[module])

    def calls(self, module: str, *, needed: bool = True) -> list[LayerCall]:
        """The calls of a module of the checkpoint.

        Args:
            module: The module.
            needed: Whether there must be one; none if all are inside operators.

        Raises:
            CheckpointError: If nothing in the graph computes it.
        """
        path = self.names[module]
        found = self.finder.calls(path)
        if needed and not found:
            raise self.finder.missing(path)
        return found

    def slot_name(self, module: str, path: str = "") -> str:
        """What to call a slot on a module of the checkpoint.

        Args:
            module: The module's path in the checkpoint.
            path: The path in the graph of what is adapted, if it is not the module's: a layer
                that computes it with others. For example the layer `layers.0.attn.qkv_proj`
                is `model.layers.0.attn.qkv_proj` beside `model.layers.0.attn.q_proj`.
        """
        ours = self.names[module]
        path = path or ours
        if not self.full_names:
            return path
        theirs, added = beginnings(module, ours)
        inside = path.removeprefix(f"{added}." if added else "")
        return (
            ".".join(filter(None, (theirs, inside))) if inside != path or not added else path
        )

    def with_bias(self, module: str, call: LayerCall) -> Site:
        """The site of a module's output with its bias.

        Raises:
            CheckpointError: If an optimiser moved the bias or the activation behind it into
                one node with others.
        """
        site = self.survey.site(call.view, call.output)
        behind = bias_behind(self.survey.index, call.view, call.output, call.sizes[1])
        inside = inside_layer(call.node)
        if behind is None and not inside:
            return site
        why = behind or f"{inside} is inside node {call.label!r}"
        raise CheckpointError(
            f"module {module!r} has no output of its own in the graph, which this adapter "
            f"changes: {why}",
            hint="insert into the model as it was exported and optimise the result",
        )

    def add(
        self,
        target: Site,
        name: str,
        parts: Mapping[str, Array],
        form: Form = _PLAIN,
        *,
        front: str = "",
    ) -> None:
        """Add a slot with its weights.

        Args:
            target: The place.
            name: What to call the slot; a number is added if another has the name.
            parts: The weights by part.
            form: What the slot computes; its parts are those of the weights.
            front: What an earlier slot on the place reads, to go in front of it; '' to go
                behind all.

        Raises:
            CheckpointError: If the site cannot take it.
        """
        width = target.width
        if width is None and str(target.refused).startswith("unknown width"):
            width = _width_of(parts)  # the checkpoint tells what the graph does not
        elif target.refused is not None:
            width = None
        if width is None:
            raise CheckpointError(
                f"{name!r}: tensor {target.tensor!r} cannot take an adapter: {target.refused}"
            )
        unique = free_name(name, self.taken)
        self.taken.add(unique)
        self.wanted[unique] = name
        ordered = in_order(parts)
        slot = new_slot(unique, target, replace(form, parts=ordered), width=width)
        if front and front != slot.output:
            slot = replace(slot, output=front)
        dtype = DTYPES[target.dtype]
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            weights = {
                part: np.ascontiguousarray(_laid_out(slot, part, parts[part]), dtype)
                for part in ordered
            }
        _check_weights(slot, parts, weights)
        self.slots.append(slot)
        self.weights[unique] = weights

    def add_beside(
        self,
        module: str,
        target: Site,
        packing: Packing,
        parts: Mapping[str, Array],
        form: Form = _PLAIN,
        *,
        front: str = "",
    ) -> None:
        """Add the weights of one of the modules that a layer computes side by side.

        Modules that read one tensor and write another have one slot, which is called after
        the layer. Its `down` has the columns of all their projections, one after the other,
        and its `up` the rows. For example LoRA of rank 4 on `q_proj` and of rank 8 on `v_proj`
        is a slot of rank 12 on `qkv_proj`.

        Args:
            module: The module's path in the checkpoint.
            target: The place, on the columns of all modules.
            packing: The modules that the layer computes.
            parts: The weights by part, on all columns: `up` is zero outside the module's.
            form: What the slot computes; its parts are those of the weights.
            front: As in `add`.
        """
        key = (target.address, form.source)
        if key in self.beside:
            name = self.beside[key]
            self._set_weights(name, joined_beside(self.weights[name], parts))
            return
        self.add(target, self.slot_name(module, packing.layer), parts, form, front=front)
        slot = self.slots[-1]
        self.beside[key] = slot.name
        self.slots[-1] = replace(slot, modules=packing.modules, columns=packing.columns)

    def add_on_input(self, target: InputTarget, name: str, parts: Mapping[str, Array]) -> None:
        """Add a slot with its weights on what one layer reads.

        Args:
            target: The layer's input.
            name: What to call the slot; a number is added if another has the name.
            parts: The weights by part.
        """
        unique = free_name(name, self.taken)
        self.taken.add(unique)
        self.wanted[unique] = name
        slot = new_input_slot(unique, target, Form(parts=in_order(parts)))
        self.slots.append(slot)
        shaped = {part: _laid_out(slot, part, value) for part, value in parts.items()}
        self._set_weights(unique, shaped)

    def add_on_weight(
        self,
        target: WeightTarget,
        name: str,
        parts: Mapping[str, Array],
        packing: Packing | None,
        *,
        apart: bool,
    ) -> None:
        """Add the weights of one module for a slot on a weight; modules share one slot.

        Args:
            target: The weight.
            name: What to call the slot; a number is added if another has the name.
            parts: The weights by part, for the whole weight.
            packing: The modules whose columns the weight has, or None.
            apart: Whether the other modules in the weight have matrices of a stack to
                themselves, so that one bottleneck does for all.
        """
        # Readers tell apart modules of equal weights, which an optimiser stored once.
        key = (target.graph, target.tensor, target.readers)
        if key in self.on_weights:
            join = joined_apart if apart else joined_beside
            known = self.on_weights[key]
            self._set_weights(known, join(self.weights[known], parts))
            return
        unique = free_name(name, self.taken)
        self.taken.add(unique)
        self.wanted[unique] = name
        slot = new_weight_slot(unique, target, in_order(parts))
        if packing is not None:
            slot = replace(slot, modules=packing.modules, columns=packing.columns)
        self.on_weights[key] = unique
        self.slots.append(slot)
        self._set_weights(unique, parts)

    def _set_weights(self, name: str, parts: Mapping[str, Array]) -> None:
        """Give a slot weights in place of those that it has, and the parts of these."""
        at = next(i for i, slot in enumerate(self.slots) if slot.name == name)
        slot = self.slots[at] = replace(self.slots[at], parts=in_order(parts))
        dtype = DTYPES[slot.dtype]
        with np.errstate(over="ignore"):
            self.weights[name] = {
                part: np.ascontiguousarray(parts[part], dtype) for part in slot.parts
            }
        _check_weights(slot, parts, self.weights[name])


def _check_weights(
    slot: Slot, given: Mapping[str, Array], weights: Mapping[str, Array]
) -> None:
    """Refuse weights that do not fit their slot, or hold NaN or infinity."""
    size = bottleneck_of(slot, weights)
    for part, value in weights.items():
        expected = part_shape(slot, part, size)
        if value.shape != expected or not value.size:
            raise CheckpointError(
                f"{slot.name!r}: {part} has shape {list(given[part].shape)}; the graph needs "
                f"{list(expected)}",
                hint="is it an adapter for another size of this model?",
            )
        if not np.isfinite(value.astype(np.float64)).all():
            raise CheckpointError(
                f"{slot.name!r}: {part} holds NaN or infinity in {slot.dtype}",
                hint="the training diverged, or a setting of the checkpoint is out of range",
            )


def _width_of(parts: Mapping[str, Array]) -> int | None:
    """The width that weights were trained for; None if they do not tell."""
    for name in in_order(parts):
        shape, value = PARTS[name].shape, parts[name]
        if "width" in shape and value.ndim == len(shape):
            return int(value.shape[shape.index("width")])
    return None


def _laid_out(slot: Slot, part: str, value: Array) -> Array:
    """Add the trailing axes of size 1 that Conv's layout needs to a vector over channels."""
    if slot.axis == 1 and PARTS[part].channels == ("width", "ones"):
        return value.reshape(-1, *(1,) * (slot.rank - 2))
    return value
