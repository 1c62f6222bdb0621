"""From what a checkpoint asks for to slots with weights in one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnx_adapt.activations import DTYPES, Array
from onnx_adapt.checkpoints.cores import (
    Core,
    block_output,
    find_cores,
    norm_behind,
    read_bias,
    read_matrix,
    residual_add,
)
from onnx_adapt.checkpoints.edits import Bottleneck, Coupling, Edit, LowRank, Scaling
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph import attribute
from onnx_adapt.layers import find_weight
from onnx_adapt.manifest import Slot
from onnx_adapt.model_file import Model
from onnx_adapt.modules import module_output
from onnx_adapt.plan import free_name
from onnx_adapt.sites import Site, Survey
from onnx_adapt.slot import PARTS

Cores = Callable[[str], list[Core]]


@dataclass(slots=True)
class Workshop:
    """What is known and made while a checkpoint is placed in a graph.

    Attributes:
        model: The model.
        survey: Its survey.
        cores: Finds the calls of a module.
        names: The graph's path for each module of the checkpoint.
        taken: Names that slots already have.
        slots: The slots so far.
        weights: Their weights, by slot and part.
    """

    model: Model
    survey: Survey
    cores: Cores
    names: Mapping[str, str]
    taken: set[str]
    slots: list[Slot] = field(default_factory=list)
    weights: dict[str, dict[str, Array]] = field(default_factory=dict)

    def calls(self, module: str) -> list[Core]:
        """The calls of a module of the checkpoint.

        Raises:
            CheckpointError: If nothing in the graph computes it.
        """
        path = self.names[module]
        found = self.cores(path)
        if not found:
            raise CheckpointError(
                f"module {path!r} is in the graph, but no MatMul, Gemm, Conv or Gather of it",
                hint="was the model optimised? insert the adapter into it as exported",
            )
        return found

    def add(
        self,
        target: Site,
        name: str,
        parts: Mapping[str, Array],
        *,
        source: str = "",
        source_width: int = 0,
        activation: str = "identity",
        plus: str = "",
        norm: str = "",
        norm_after: str = "",
        window: tuple[int, ...] = (),
    ) -> None:
        """Add a slot with its weights.

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
        ordered = sorted(parts, key=PARTS.index)
        inner = f"adapter.{unique}/target"
        slot = Slot(
            name=unique,
            graph=target.graph,
            node=target.node,
            tensor=target.tensor,
            inner=inner,
            output=target.tensor,
            source=source if source and source != target.tensor else inner,
            width=width,
            source_width=source_width or width,
            dtype=target.dtype,
            axis=target.axis,
            rank=(target.rank or 0) if target.axis == 1 else 0,
            activation=activation,
            parts=tuple(ordered),
            plus=plus,
            norm=norm,
            norm_after=norm_after,
            module=target.module or "",
            swappable=True,
            bottleneck=0,
            window=window,
        )
        dtype = DTYPES[target.dtype]
        self.slots.append(slot)
        self.weights[unique] = {
            part: np.ascontiguousarray(_laid_out(slot, part, parts[part]), dtype)
            for part in ordered
        }


def _width_of(parts: Mapping[str, Array]) -> int | None:
    """The width that a slot's weights have been trained for."""
    for part, axis in (("up_bias", 0), ("scale", 0), ("up", 1)):
        if part in parts and parts[part].ndim <= 2:
            return int(parts[part].shape[axis])
    return None


def _laid_out(slot: Slot, part: str, value: Array) -> Array:
    """A vector over channels with the trailing ones of Conv's layout."""
    if slot.axis == 1 and part in ("scale", "gain"):
        return value.reshape(-1, *(1,) * (slot.rank - 2))
    return value


def place(shop: Workshop, edit: Edit) -> None:
    """Make the slots that one edit asks for.

    Raises:
        CheckpointError: If the graph has no place for it.
    """
    if isinstance(edit, LowRank):
        for core in shop.calls(edit.module):
            _place_low_rank(shop, edit, core)
    elif isinstance(edit, Scaling):
        for core in shop.calls(edit.module):
            _place_scaling(shop, edit, core)
    elif isinstance(edit, Bottleneck):
        for core in shop.calls(edit.module):
            _place_bottleneck(shop, edit, core)
    elif isinstance(edit, Coupling):
        _place_coupling(shop, edit)


def _place_low_rank(shop: Workshop, edit: LowRank, core: Core) -> None:
    a, b = edit.a, edit.b
    window: tuple[int, ...] = ()
    if core.node.op_type == "Gather":
        parts = {"table": a.T, "up": b.T}
    elif core.node.op_type == "Conv":
        window = _window(core, a)
        b = _dense(b, attribute(core.node, "group", 1))
        parts = {"down": a, "up": b}
    else:
        parts = {"down": a.T, "up": b.T}
    _check_sizes(edit, core, a, b)
    up_axis = 0 if core.node.op_type == "Conv" else 1
    parts["up"] = parts["up"] * edit.scale
    if edit.bias is not None:
        parts["up_bias"] = edit.bias.astype(np.float64) * edit.scale
    target = shop.survey.site(core.view, core.output)
    if edit.magnitude is not None:
        scale = _dora_scale(shop, edit, core, b)
        shape = [1] * parts["up"].ndim
        shape[up_axis] = -1
        parts["up"] = parts["up"] * scale.reshape(shape)
        parts["scale"] = scale
        if "up_bias" in parts:
            parts["up_bias"] = parts["up_bias"] * scale
        inside = read_bias(shop.model, core)
        if not edit.scales_bias and inside is not None:
            parts["up_bias"] = parts.get("up_bias", 0) + (1 - scale) * inside
        elif not edit.scales_bias:
            target = shop.survey.site(core.view, core.raw)
    if edit.gate is not None:
        if core.node.op_type not in ("MatMul", "FusedMatMul"):
            raise CheckpointError(
                f"{edit.module!r}: gating needs the sequence axis, which is folded away here"
            )
        parts["gate"], parts["gate_bias"] = edit.gate[0].T, edit.gate[1]
    source = shop.survey.settled(core.view.scope.path, core.data)
    shop.add(
        target,
        shop.names[edit.module],
        parts,
        source=source,
        source_width=a.shape[1],
        window=window,
    )


def _check_sizes(edit: LowRank, core: Core, a: Array, b: Array) -> None:
    weight = find_weight(core.view, core.weight)
    dims = weight.dims if weight else ()
    if core.node.op_type == "Conv":
        inputs = dims[1] * attribute(core.node, "group", 1)
        fits = (a.shape[1], *a.shape[2:], b.shape[0]) == (inputs, *dims[2:], dims[0])
    elif core.node.op_type == "Gather":
        fits = (a.shape[1], b.shape[0]) == dims
    elif core.node.op_type == "MatMulNBits":
        sizes = tuple(attribute(core.node, name, 0) for name in "KN")
        fits = (a.shape[1], b.shape[0]) == sizes
    else:
        sizes = dims if core.stored_in_out else dims[::-1]
        fits = (a.shape[1], b.shape[0]) == sizes
    if not fits or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"module {edit.module!r}: A {list(edit.a.shape)} and B {list(edit.b.shape)} do "
            f"not fit the base's weight {list(dims)}",
            hint="is it an adapter for another size of this model?",
        )


def _window(core: Core, a: Array) -> tuple[int, ...]:
    """The window of A on a Conv: the Conv's own kernel, strides and pads.

    PEFT gives A no dilation; where the Conv has one, only padding="same" lines up, and A
    is padded by the same rule for its own kernel.
    """
    n = a.ndim - 2
    kernel = a.shape[2:]
    lists = {item.name: list(item.ints) for item in core.node.attribute}
    automatic = next((i.s for i in core.node.attribute if i.name == "auto_pad"), b"NOTSET")
    strides = lists.get("strides", [1] * n)
    pads = lists.get("pads", [0] * 2 * n)
    dilated = any(step != 1 for step in lists.get("dilations", ()))
    if automatic == b"VALID":
        pads = [0] * 2 * n
    elif automatic == b"SAME_UPPER" or dilated:
        if any(step != 1 for step in strides):
            raise CheckpointError(
                f"{core.node.name!r}: LoRA on a Conv with strides and dilation or automatic "
                "padding is not supported"
            )
        before = [(size - 1) // 2 for size in kernel]
        pads = before + [size - 1 - left for size, left in zip(kernel, before, strict=True)]
    elif automatic not in (b"NOTSET", b""):
        raise CheckpointError(f"{core.node.name!r}: auto_pad {automatic!r} is not supported")
    window = (*kernel, *strides, *pads, *(1,) * n)
    return () if window == (1,) * 2 * n + (0,) * 2 * n + (1,) * n else window


def _dense(b: Array, groups: int) -> Array:
    """A grouped 1x1 convolution's weight as the full one: zero between groups."""
    out, rank = b.shape[0] // groups, b.shape[1]
    dense = np.zeros((b.shape[0], rank * groups, *b.shape[2:]))
    for i in range(groups):
        dense[i * out : (i + 1) * out, i * rank : (i + 1) * rank] = b[i * out : (i + 1) * out]
    return dense


def _dora_scale(shop: Workshop, edit: LowRank, core: Core, b: Array) -> Array:
    """DoRA: magnitude over the norm of the adapted weight's rows (arXiv 2402.09353)."""
    weight = read_matrix(shop.model, core)
    if core.node.op_type == "Gather":
        weight = weight.T
    flat = weight.reshape(weight.shape[0], -1)
    groups = attribute(core.node, "group", 1)
    if groups != 1:
        raise CheckpointError(f"{edit.module!r}: DoRA on a Conv with groups is not supported")
    delta = b.reshape(b.shape[0], -1) @ edit.a.reshape(edit.a.shape[0], -1)
    norm = np.linalg.norm(flat + edit.norm_scale * delta, axis=1)
    assert edit.magnitude is not None
    return np.asarray(edit.magnitude.astype(np.float64) / norm)


def _place_scaling(shop: Workshop, edit: Scaling, core: Core) -> None:
    name = shop.names[edit.module]
    parts = {"scale": edit.vector.astype(np.float64)}
    if not edit.on_input:
        shop.add(shop.survey.site(core.view, core.output), name, parts)
        return
    tensor = shop.survey.settled(core.view.scope.path, core.data)
    readers = core.view.readers(tensor)
    made = core.view.home(tensor)
    if len(readers) == 1 and made is core.view and tensor in core.view.producers:
        shop.add(shop.survey.site(core.view, tensor), f"{name}.input", parts)
        return
    raise CheckpointError(
        f"module {edit.module!r}: its input {tensor!r} is read by {len(readers)} nodes and "
        "cannot be scaled for one of them alone",
        hint="merge this adapter in PyTorch and export again",
    )


def _place_bottleneck(shop: Workshop, edit: Bottleneck, core: Core) -> None:
    module = shop.names[edit.module]
    view = core.view
    output = block_output(shop.survey, core, module)
    target, source, plus, norm, width = output, "", "", "", 0
    if edit.place != "output" or edit.reads != "target":
        total, residual = residual_add(view, output)
        if edit.place == "norm":
            target = norm_behind(view, total)
        elif edit.place == "residual":
            target = total
        if edit.reads == "residual_input":
            source, width = residual, edit.parts["down"].shape[0]
        elif edit.reads in ("sum", "normed_sum"):
            plus = residual
        if edit.reads in ("norm", "normed_sum"):
            norm = norm_behind(view, total)
    shop.add(
        shop.survey.site(view, shop.survey.settled(view.scope.path, target)),
        module if edit.place == "output" else f"{module}.{edit.place}",
        edit.parts,
        source=source,
        source_width=width,
        activation=edit.activation,
        plus=plus,
        norm=norm,
        norm_after=edit.norm_after,
    )


def _place_coupling(shop: Workshop, edit: Coupling) -> None:
    module = shop.names[edit.module]
    places = module_output(shop.survey.modules, module)
    if len(places) != 1:
        raise CheckpointError(f"the output of {module!r} was not found in the graph")
    view, tensor = places[0]
    site = shop.survey.site(view, shop.survey.settled(view.scope.path, tensor))
    shop.add(site, f"{module}.coupling", edit.parts, activation=edit.activation)


def default_cores(survey: Survey) -> Cores:
    """Find the calls of a module by the traces of its exporter."""
    return lambda module: find_cores(survey, module)
