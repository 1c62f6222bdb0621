"""Plan slots: turn a site and what the user asked for into the description of a slot."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from onnx_adapt.errors import SiteError
from onnx_adapt.graph.choice import Choice
from onnx_adapt.graph.index import GraphView, ModelIndex, Shape, elem_name
from onnx_adapt.graph.layout import given_axis
from onnx_adapt.graph.norms import find_norms, one_node
from onnx_adapt.graph.resolve import resolve_tensor
from onnx_adapt.graph.site import Site
from onnx_adapt.graph.sites import Survey
from onnx_adapt.slot.form import Form, new_slot
from onnx_adapt.slot.formula import mark_node
from onnx_adapt.slot.manifest import Slot
from onnx_adapt.slot.names import node_name


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asks of every slot of one insertion.

    Attributes:
        form: What the slots have in common, but for the tensors that they read.
        source: Name of the tensor the adapter reads; '' is the target itself.
        axis: The feature axis, if the user names it.
        norm: Name of the base's normalisation to re-apply to the source, or ''.
        seed: Seed of the fresh weights.
    """

    form: Form
    source: str = ""
    axis: int | None = None
    norm: str = ""
    seed: int = 0


def plan_slot(survey: Survey, choice: Choice, name: str, recipe: Recipe) -> Slot:
    """Describe the slot that a recipe gives at one site.

    Raises:
        SiteError: If the source or the normalisation does not fit the site.
    """
    site = choice.site
    source, source_width = "", site.width or 0
    if recipe.source:
        read = _source_site(survey, recipe)
        if read.address != site.address:
            source, source_width = read.tensor, _check_source(survey, site, read)
    norm = _norm_tensor(survey, site, recipe.norm, source_width)
    form = replace(recipe.form, source=source, source_width=source_width, norm=norm)
    return new_slot(name, site, form)


def _source_site(survey: Survey, recipe: Recipe) -> Site:
    """Find the tensor that the adapter reads, on the axis that the user named, if any."""
    read = _input_site(survey, recipe.source, recipe.axis)
    if read is None:
        read = resolve_tensor(survey, recipe.source)
        read = read if recipe.axis is None else survey.on_axis(read, recipe.axis)
    return read


def _input_site(survey: Survey, name: str, axis: int | None) -> Site | None:
    """Describe an input of the model as a site to read from; None if no input has the name."""
    main = survey.index.main
    inputs = {value.name for value in main.scope.graph.input} - set(main.constants)
    if name not in inputs:
        return None
    known = main.type_of(name)
    rank = len(known.shape) if known.shape else None
    features = survey.layout.of(main, name) if axis is None else given_axis(axis, rank)
    at = features.axis
    size = (
        known.shape[at] if known.shape and at is not None and at < len(known.shape) else None
    )
    return Site(
        address=f"main:{name}",
        node="",
        op="",
        tensor=name,
        module=None,
        width=size if isinstance(size, int) else None,
        dtype=elem_name(known.elem_type),
        axis=features.axis,
        refused=features.refused,
        graph="main",
        rank=rank,
        layer=False,
        core=-1,
    )


def _check_source(survey: Survey, site: Site, read: Site) -> int:
    """Check that a source can be read at a site and lines up with it.

    Returns:
        The source's width.

    Raises:
        SiteError: If it is computed later, elsewhere, or has another leading shape.
    """
    what = f"source {read.tensor!r}"
    if read.axis is None and read.dtype == site.dtype:
        raise SiteError(
            f"{what} cannot be read by an adapter: {read.refused}",
            hint="if you know its feature axis, say so: --axis -1 or --axis 1",
        )
    if read.dtype != site.dtype or read.width is None or read.axis != site.axis:
        raise SiteError(
            f"{what} ({read.dtype or 'unknown type'}, width {read.width}, axis {read.axis}) "
            f"does not fit target {site.tensor!r} ({site.dtype}, axis {site.axis})",
            hint="the source must be a tensor of the same type and layout",
        )
    view = survey.index.views[site.graph]
    home = view.home(read.tensor)
    if home is None or home.scope.path != read.graph:
        raise SiteError(
            f"{what} cannot be read where target {site.tensor!r} is computed",
            hint=f"name a tensor of graph {site.graph} or of one around it",
        )
    if not _comes_before(view, home, read.tensor, site.tensor):
        raise SiteError(
            f"{what} is computed after target {site.tensor!r}",
            hint="an adapter can only read what is there before its target",
        )
    theirs = home.type_of(read.tensor).shape
    ours = view.type_of(site.tensor).shape
    if theirs is None or ours is None or _line_up(survey, site, theirs, ours):
        return read.width
    raise SiteError(
        f"{what} has shape {list(theirs)} and target {site.tensor!r} {list(ours)}",
        hint="all axes but the feature axis must be the same",
    )


def _line_up(survey: Survey, site: Site, one: Shape, other: Shape) -> bool:
    """Whether two shapes agree on all axes but the feature axis, as far as they are known."""
    if len(one) != len(other):
        return False
    features = (site.axis or -1) % len(other) if other else 0
    declared = _declared_symbols(survey)
    return not any(
        p != q
        for i, (p, q) in enumerate(zip(one, other, strict=True))
        if i != features and all(isinstance(d, int) or d in declared for d in (p, q))
    )


def _declared_symbols(survey: Survey) -> set[int | str | None]:
    """The symbolic dimensions of the model's own inputs; inference makes up the others."""
    main = survey.index.main
    names = [value.name for value in main.scope.graph.input]
    return {d for n in names for d in main.type_of(n).shape or () if isinstance(d, str)}


def _comes_before(view: GraphView, home: GraphView, source: str, target: str) -> bool:
    position = view.producers[target]
    if view is home and home.producers.get(source) == position:
        return True  # another output of the same node
    while view is not home and view.parent is not None:
        position = view.scope.owner
        view = view.parent
    return home.producers.get(source, -1) < position


def _norm_tensor(survey: Survey, site: Site, name: str, width: int) -> str:
    """Find the output of the normalisation of the base that a name means."""
    if not name:
        return ""
    found = resolve_tensor(survey, name)
    if found.op not in ("LayerNormalization", "RMSNormalization"):
        raise SiteError(
            f"{name!r} is a {found.op}, not a LayerNormalization or RMSNormalization",
            hint="name the node of the normalisation to re-apply",
        )
    view = survey.index.views[found.graph]
    node = view.nodes[found.core]
    here = survey.index.views[site.graph]
    for weight in node.input[1:]:
        if weight and here.constant(weight) is None:
            raise SiteError(f"the weights of normalisation {name!r} are not constant here")
    weight_width = here.constant(node.input[1]) if len(node.input) > 1 else None
    if weight_width is not None and list(weight_width.dims) != [width]:
        raise SiteError(
            f"normalisation {name!r} is {list(weight_width.dims)} wide, the source {width}",
            hint="name the normalisation of a tensor as wide as the source",
        )
    return str(node.output[0])


def norm_nodes(index: ModelIndex, slot: Slot) -> list[onnx.NodeProto]:
    """Copy the nodes of the base's normalisation that a slot re-applies, its Constants first.

    The Constants are copied because those of the base may come after the slot in the graph.
    """
    if not slot.norm:
        return []
    here = index.views[slot.graph]
    home = next(v for v in (here, *index.views.values()) if slot.norm in v.producers)
    norm = onnx.NodeProto()
    norm.CopyFrom(home.nodes[home.producers[slot.norm]])
    if norm.op_type in ("Mul", "Add"):
        base = next(n for n in find_norms(index.model, home) if n.output == slot.norm)
        weights = [base.weight_tensor, *filter(None, [base.bias_tensor])]
        norm = one_node(base.read, weights, base.output, base.epsilon)
    constants = []
    for position, name in enumerate(norm.input):
        made = here.producer(name) if position and name else None
        if made is not None and made[1].op_type == "Constant":
            copy = onnx.NodeProto()
            copy.CopyFrom(made[1])
            copy.name = node_name(slot.name, f"norm_constant_{position}")
            norm.input[position] = copy.output[0] = copy.name
            del copy.metadata_props[:]
            mark_node(copy, slot)
            constants.append(copy)
    return [*constants, norm]
