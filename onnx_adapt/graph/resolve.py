"""From what a user writes to sites: an address, a node, a tensor, a module, a glob.

For example, `encoder.layer.*.output.dense` is no address, node or tensor, and it has a `*`. So
it is matched against the names of layers, then against module paths, in which `*` stays
between two dots. It means one module in each layer, and of each module the last tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onnx_adapt.errors import (
    AmbiguousSiteError,
    SiteNotFoundError,
    SiteRefusedError,
)
from onnx_adapt.graph.choice import (
    Choice,
    ambiguous,
    none_usable,
    require_usable,
)
from onnx_adapt.graph.described import hidden
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.fused_layers import inside_layer
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.module_calls import module_calls
from onnx_adapt.graph.modules import match_path
from onnx_adapt.graph.site import Site, Sites
from onnx_adapt.graph.sites import Survey, survey_model
from onnx_adapt.graph.unfusing import can_write_out, is_known
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.words import glob_matcher, nearest

_GLOB = re.compile(r"[*?]")


@dataclass(frozen=True, slots=True)
class Resolution:
    """What names mean in a model.

    Attributes:
        choices: The sites, in the order they were named; globs last.
        skipped: Sites that a glob matched and that cannot take an adapter.
    """

    choices: tuple[Choice, ...]
    skipped: tuple[Site, ...]


def resolve(survey: Survey, names: Sequence[str], *, axis: int | None = None) -> Resolution:
    """Find the sites that names mean.

    A name is tried as a site's address, a node's name, a tensor's name, a PyTorch module
    path, and a glob over these: `*` stays within one part of a path, `**` does not. A
    site named twice is chosen twice. A module that runs several times is one choice, with a
    site for each of its calls. A glob adds only what is not chosen yet, and each call of such
    a module is a choice of its own. An `axis` that the user names is the feature axis of each
    site.

    Raises:
        SiteNotFoundError: If nothing has the name; the hint lists the nearest.
        AmbiguousSiteError: If a name that is no glob means several places.
        SiteRefusedError: If the place cannot take an adapter.
    """

    def laid(choice: Choice) -> Choice:
        if axis is None:
            return choice
        further = tuple(survey.on_axis(site, axis) for site in choice.further)
        return replace(choice, site=survey.on_axis(choice.site, axis), further=further)

    choices: list[Choice] = []
    skipped: dict[str, Site] = {}
    globs: list[str] = []
    for name in names:
        choice = _exact(survey, name)
        if choice is not None:
            choices.append(laid(choice))
            for site in (choices[-1].site, *choices[-1].further):
                require_usable(survey, replace(choices[-1], site=site))
        elif _GLOB.search(name):
            globs.append(name)
        else:
            raise _not_found(survey, name)
    for pattern in globs:
        hits = [laid(hit) for hit in _glob(survey, pattern)]
        usable = [hit for hit in hits if hit.refused is None]
        if not usable:
            raise none_usable(survey, pattern, hits) if hits else _not_found(survey, pattern)
        taken = {s.address for choice in choices for s in (choice.site, *choice.further)}
        choices += [hit for hit in usable if hit.site.address not in taken]
        skipped.update((h.site.address, h.site) for h in hits if h.refused)
    return Resolution(tuple(choices), tuple(skipped.values()))


def fused_places(survey: Survey, names: Sequence[str]) -> list[FusedPlace]:
    """Find the fused nodes that hold the output of a layer or module that a name means.

    They can be written out, so that the output is a tensor of the graph.
    """
    found: list[FusedPlace] = []
    for name in names:
        choice = _exact(survey, name)
        hits = [choice] if choice else _glob(survey, name) if _GLOB.search(name) else []
        for hit in hits:
            if not hit.literal and hit.site.graph in survey.index.views:
                found += _fused_place(survey, hit)
    return found


def _fused_place(survey: Survey, choice: Choice) -> Iterator[FusedPlace]:
    site = choice.site
    view = survey.index.views[site.graph]
    node = view.nodes[site.node_index]
    behind = bias_behind(survey.index, view, site.tensor, site.width)
    if behind is not None and can_write_out(behind):
        yield FusedPlace(site.graph, str(behind.node.output[0]), site.tensor)
    elif site.before_bias and inside_layer(node) and is_known(node):
        yield FusedPlace(site.graph, str(node.output[0]), "")


def resolve_tensor(survey: Survey, name: str) -> Site:
    """The one tensor that a name means, for reading: it may be any float tensor.

    Raises:
        SiteError: As `resolve` does, globs not being allowed.
    """
    choice = _exact(survey, name)
    if choice is None:
        raise _not_found(survey, name)
    if choice.further:
        raise ambiguous(name, [choice.site, *choice.further])
    return choice.site


def find_sites(
    model: ModelLike, pattern: str | None = None, *, all_tensors: bool = False
) -> Sites:
    """Find the places that can take an adapter, and those that cannot with the reason.

    A name or a glob that `insert(model, after=pattern)` takes finds the same places there and
    here. Any other pattern finds what it is a part of.

    Args:
        model: The model to look at.
        pattern: A name, a glob, or a part of an address, node, tensor or module.
        all_tensors: Look at every float tensor, not only at the outputs of layers.

    Raises:
        SiteNotFoundError: If the pattern matches nothing.

    Example:
        >>> import onnx_adapt as oa
        >>> sites = oa.find_sites("models/dnsmos-p808.onnx", "dense")
        >>> [(site.op, site.width) for site in sites]
        [('MatMul', 64), ('MatMul', 64), ('MatMul', 1)]
    """
    survey = survey_model(as_model(model))
    sites = survey.sites if all_tensors else survey.layers
    if pattern is None:
        return Sites(sites)
    found = {site.address: site for site in _meant(survey, pattern)}
    if all_tensors or not found:
        matches = _matcher(pattern)
        others = (site for site in sites if matches(site))
        found = {site.address: site for site in others} | found
    if not found:
        raise _not_found(survey, pattern)
    order = {site.address: place for place, site in enumerate(survey.sites)}
    return Sites(sorted(found.values(), key=lambda site: order.get(site.address, len(order))))


def _meant(survey: Survey, name: str) -> list[Site]:
    """The sites that a name or glob means to `resolve`, usable or not, or none."""
    try:
        choice = _exact(survey, name)
    except AmbiguousSiteError:
        return []
    if choice is not None:
        return [choice.site, *choice.further]
    return [hit.site for hit in _glob(survey, name)] if _GLOB.search(name) else []


def _matcher(pattern: str) -> Callable[[Site], bool]:
    """What tells whether a pattern matches a label of a site, or is a part of one."""
    if not _GLOB.search(pattern):
        return lambda site: any(pattern in name for name in _labels(site))
    plain, path = glob_matcher(pattern, "/"), glob_matcher(pattern, ".")
    return lambda site: path(site.module or "") or any(map(plain, _labels(site)))


def _labels(site: Site) -> tuple[str, ...]:
    return site.address, site.node, *site.also, site.tensor, site.module or ""


def _exact(survey: Survey, name: str) -> Choice | None:
    if (site := survey.at(name)) is not None:
        return replace(_choice(site), literal=True)
    for find in (_by_node, _by_tensor, _by_module):
        choices = find(survey, name)
        if len(choices) > 1:
            raise ambiguous(name, [choice.site for choice in choices])
        if choices:
            return choices[0]
    hidden = survey.hidden.get(name)
    return _choice(hidden[0]) if hidden else None


def _choice(site: Site) -> Choice:
    """A site, with a name that is the same when an exporter numbers its nodes otherwise."""
    if site.module:
        name = site.module if site.layer else f"{site.module}.{site.op.lower()}"
        return Choice(site, name)
    return Choice(site, site.node or site.tensor)


def _by_node(survey: Survey, name: str) -> list[Choice]:
    """The site after a node: its first output, and for a layer that with the bias."""
    found = []
    for view, i in survey.by_node(name):
        layers = survey.layers_of(view.scope.path, i)
        output = next(output for output in view.nodes[i].output if output)
        last = survey.after_slots(view.scope.path, output)
        found.append(_choice(layers[0] if layers else survey.site(view, last)))
    return found


def _by_tensor(survey: Survey, name: str) -> list[Choice]:
    found = []
    for path, view in survey.index.views.items():
        if name not in view.producers:
            continue
        tensor = survey.after_slots(path, name)
        inserted = slot_of(view.nodes[view.producers[tensor]])
        if not inserted or survey.at(f"{path}:{tensor}") is not None:
            found.append(replace(_choice(survey.site(view, tensor)), literal=True))
    return found


def _by_module(survey: Survey, name: str) -> list[Choice]:
    paths = match_path(survey.modules.paths, name)
    called = [calls for path in paths if (calls := _module_choices(survey, path))]
    return [
        replace(first, further=tuple(other.site for other in others))
        for first, *others in called
    ]


def _module_choices(survey: Survey, path: str) -> list[Choice]:
    """The output of a module, of each of its calls if it runs several times."""
    found = []
    for view, tensors in module_calls(survey.modules, path):
        for tensor in tensors:
            site = survey.site(view, survey.after_slots(view.scope.path, tensor))
            _refuse_normed(survey, view, site, path)
            if _swallows(survey, view, site, path):
                why = f"{inside_layer(view.nodes[site.node_index])} is inside its own node"
                site = replace(site, before_bias=why)
            elif not site.layer:  # such as the product of integers, rescaled
                behind = bias_behind(survey.index, view, site.tensor, site.width)
                site = replace(site, before_bias=hidden(behind))
            found.append(Choice(site, path))
    return found


def _refuse_normed(survey: Survey, view: GraphView, site: Site, path: str) -> None:
    """Refuse a Conv that TorchScript named after the Conv alone, with its BatchNorm inside."""
    node = view.nodes[site.node_index]
    normed = node.op_type == "Conv" and any(
        text(name).startswith("onnx::Conv_") for name in node.input[1:2]
    )
    if normed and _is_layer_of(survey, site, path):
        raise SiteRefusedError(
            f"module {path!r} has no output of its own: the normalisation behind it was "
            f"fused into node {site.node!r}",
            hint=f"--after {site.node} inserts after both",
        )


def _swallows(survey: Survey, view: GraphView, site: Site, path: str) -> bool:
    """Whether a module's own node holds what is behind it, as FusedGemm does."""
    inside = inside_layer(view.nodes[site.node_index])
    return bool(inside) and _is_layer_of(survey, site, path)


def _is_layer_of(survey: Survey, site: Site, path: str) -> bool:
    layers = survey.layers_of(site.graph, site.node_index)
    return any(layer.module == path and layer.tensor == site.tensor for layer in layers)


def _glob(survey: Survey, pattern: str) -> list[Choice]:
    plain = glob_matcher(pattern, "/")

    def named(sites: Iterable[Site]) -> list[Choice]:
        return [
            _choice(site)
            for site in sites
            if any(plain(name) for name in (site.address, site.node, *site.also, site.tensor))
        ]

    hits = named(survey.layers) or _module_hits(survey, pattern) or named(survey.sites)
    # What no site is for, such as a node that makes integers, still has a reason to give.
    return hits or [
        _choice(survey.site(view, survey.after_slots(path, output)))
        for path, view in survey.index.views.items()
        for node in view.nodes
        for output in node.output
        if output and not slot_of(node) and (plain(text(node.name)) or plain(output))
    ]


def _module_hits(survey: Survey, pattern: str) -> list[Choice]:
    for match in (glob_matcher(pattern, "."), glob_matcher("**." + pattern, ".")):
        paths = [path for path in survey.modules.paths if match(path)]
        hits = {c.site.address: c for path in paths for c in _module_choices(survey, path)}
        if hits:
            return list(hits.values())
    return []


def _not_found(survey: Survey, name: str) -> SiteNotFoundError:
    main = survey.index.main
    if name in main.types and name not in main.producers:
        kind = "a weight" if name in main.constants else "an input"
        return SiteNotFoundError(
            f"{name!r} is {kind} of the model; an adapter goes after a node",
            hint="name the node that reads it, or see `onnx-adapt sites`",
        )
    called = "matches" if _GLOB.search(name) else "is called"
    wide = re.sub(r"\*+", "**", name)
    if wide != name and (hits := _glob(survey, wide)):
        return SiteNotFoundError(
            f"no node, tensor or module {called} {name!r}",
            hint=f"`*` stays within one part of a path; {wide!r} matches {len(hits)} places",
        )
    first = 0 if ":" in name else 1  # an address is only like an address
    others = (label for site in survey.sites for label in _labels(site)[first:])
    near = nearest(name, (*survey.modules.paths, *others))
    hint = f"nearest: {', '.join(near)}" if near else "see `onnx-adapt sites` for all names"
    return SiteNotFoundError(f"no node, tensor or module {called} {name!r}", hint=hint)
