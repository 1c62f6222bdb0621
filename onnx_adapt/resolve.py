"""From what a user writes to sites: an address, a node, a tensor, a module, a glob."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx

from onnx_adapt.errors import (
    AmbiguousSiteError,
    SiteError,
    SiteNotFoundError,
    SiteRefusedError,
)
from onnx_adapt.graph import GraphView, slot_of
from onnx_adapt.layers import is_layer, layer_weight
from onnx_adapt.model_file import Model
from onnx_adapt.modules import match_path, module_output, same_module
from onnx_adapt.sites import Site, Survey, survey_model

_GLOB = re.compile(r"[*?]")
_SHOWN = 8
INLINE_HINT = "--inline-functions inlines the model's functions first"


@dataclass(frozen=True, slots=True)
class Choice:
    """A site and the name a slot there should have.

    Attributes:
        site: The site.
        name: What the slot is called, before it is made unique.
    """

    site: Site
    name: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """What names mean in a model.

    Attributes:
        choices: The sites, in the order they were named; globs last.
        skipped: Sites that a glob matched and that cannot take an adapter.
    """

    choices: tuple[Choice, ...]
    skipped: tuple[Site, ...]


def resolve(survey: Survey, names: Sequence[str]) -> Resolution:
    """Find the sites that names mean.

    A name is tried as a site's address, a node's name, a tensor's name, a PyTorch module
    path, and a glob over these: `*` stays within one part of a path, `**` does not. A
    site named twice is chosen twice; a glob adds only what is not chosen yet.

    Raises:
        SiteNotFoundError: If nothing has the name; the hint lists the nearest.
        AmbiguousSiteError: If a name that is no glob means several places.
        SiteRefusedError: If the place cannot take an adapter.
    """
    choices: list[Choice] = []
    skipped: dict[str, Site] = {}
    globs: list[str] = []
    for name in names:
        choice = _exact(survey, name)
        if choice is not None:
            choices.append(_usable(survey, choice))
        elif _GLOB.search(name):
            globs.append(name)
        else:
            raise _not_found(survey, name)
    for pattern in globs:
        hits = _glob(survey, pattern)
        usable = [hit for hit in hits if hit.site.refused is None]
        if not usable:
            raise _none_usable(survey, pattern, hits)
        taken = {choice.site.address for choice in choices}
        choices += [hit for hit in usable if hit.site.address not in taken]
        skipped.update((h.site.address, h.site) for h in hits if h.site.refused)
    return Resolution(tuple(choices), tuple(skipped.values()))


def resolve_tensor(survey: Survey, name: str) -> Site:
    """The one tensor that a name means, for reading: it may be any float tensor.

    Raises:
        SiteError: As `resolve` does, globs not being allowed.
    """
    choice = _exact(survey, name)
    if choice is None:
        raise _not_found(survey, name)
    return choice.site


def select_sites(
    model: Model, pattern: str | None = None, *, all_tensors: bool = False
) -> list[Site]:
    """The sites that `onnx-adapt sites MODEL PATTERN` shows.

    A pattern without `*` or `?` matches any part of an address, node, tensor or module.

    Raises:
        SiteNotFoundError: If the pattern matches nothing.
    """
    survey = survey_model(model)
    sites = [site for site in survey.sites if all_tensors or site.layer]
    if pattern is None:
        return sites
    if _GLOB.search(pattern):
        plain, path = _matcher(pattern, "/"), _matcher(pattern, ".")
        inside = {choice.site.address for choice in _module_hits(survey, pattern)}
        found = [
            site
            for site in sites
            if site.address in inside
            or path(site.module or "")
            or any(map(plain, _labels(site)))
        ]
    else:
        found = [site for site in sites if any(pattern in name for name in _labels(site))]
    if not found:
        raise _not_found(survey, pattern)
    return found


def _labels(site: Site) -> tuple[str, str, str, str]:
    return site.address, site.node, site.tensor, site.module or ""


def _exact(survey: Survey, name: str) -> Choice | None:
    if name in survey.by_address:
        site = survey.by_address[name]
        return Choice(site, _slot_name(site))
    for find in (_by_node, _by_tensor, _by_module):
        choices = find(survey, name)
        if len(choices) > 1:
            raise _ambiguous(name, [choice.site for choice in choices])
        if choices:
            return choices[0]
    return None


def _slot_name(site: Site) -> str:
    """A name that does not change when an exporter numbers its nodes differently."""
    if site.module:
        return site.module if site.layer else f"{site.module}.{site.op.lower()}"
    return site.node or site.tensor


def _by_node(survey: Survey, name: str) -> list[Choice]:
    found = []
    for view in survey.index.views.values():
        for node in view.nodes:
            if name and node.name == name and any(node.output) and not slot_of(node):
                found.append(_node_site(survey, view, node))
    for site in survey.sites:
        if site.graph not in survey.index.views and site.node == name and name:
            found.append(Choice(site, name))
    return found


def _node_site(survey: Survey, view: GraphView, node: onnx.NodeProto) -> Choice:
    """The site after a node: its first output, and for a layer that with the bias."""
    path = view.scope.path
    output = next(name for name in node.output if name)
    layers = survey.layers_of.get((path, view.producers[output]))
    site = layers[0] if layers else survey.site(view, survey.settled(path, output))
    return Choice(site, _slot_name(site))


def _by_tensor(survey: Survey, name: str) -> list[Choice]:
    found = []
    for path, view in survey.index.views.items():
        if name not in view.producers:
            continue
        tensor = survey.settled(path, name)
        inserted = slot_of(view.nodes[view.producers[tensor]])
        if not inserted or f"{path}:{tensor}" in survey.by_address:
            site = survey.site(view, tensor)
            found.append(Choice(site, _slot_name(site)))
    return found


def _by_module(survey: Survey, name: str) -> list[Choice]:
    paths = match_path(survey.modules.paths, name)
    return [choice for path in paths for choice in _module_choices(survey, path)]


def _module_choices(survey: Survey, path: str) -> list[Choice]:
    _refuse_repeated(survey, path)
    found = []
    for view, tensor in module_output(survey.modules, path):
        settled = survey.settled(view.scope.path, tensor)
        site = survey.site(view, settled)
        _refuse_fused(survey, view, site, path)
        found.append(Choice(site, path))
    return found


def _refuse_repeated(survey: Survey, path: str) -> None:
    """A module that runs several times has several outputs: the user must say which."""
    calls: dict[str, list[Site]] = {}
    for view in survey.index.views.values():
        scopes = survey.modules.scopes[view.scope.path]
        for scope, node in zip(scopes, view.nodes, strict=True):
            if not same_module(scope, path) or not is_layer(view, node):
                continue
            weight = layer_weight(view, node)
            if weight is not None:
                key = weight.tensor.name
                site = _node_site(survey, view, node).site
                calls.setdefault(key, []).append(site)
    for sites in calls.values():
        if len(sites) > 1:
            raise AmbiguousSiteError(
                f"module {path!r} runs {len(sites)} times: {_listing(sites)}",
                hint="name each call by its address, with one --after each",
            )


def _refuse_fused(survey: Survey, view: GraphView, site: Site, path: str) -> None:
    """TorchScript names a Conv that swallowed its BatchNorm after the Conv alone."""
    for layer in survey.layers_of.get((site.graph, site.core), ()):
        node = view.nodes[site.core]
        fused = node.op_type == "Conv" and node.input[1].startswith("onnx::Conv_")
        if fused and layer.module == path and layer.tensor == site.tensor:
            raise SiteRefusedError(
                f"module {path!r} has no output of its own: the exporter fused the "
                f"normalisation behind it into node {node.name!r}",
                hint=f"--after {node.name} inserts after both",
            )


def _glob(survey: Survey, pattern: str) -> list[Choice]:
    plain = _matcher(pattern, "/")

    def named(sites: Iterable[Site]) -> list[Choice]:
        return [
            Choice(site, _slot_name(site))
            for site in sites
            if any(plain(name) for name in (site.address, site.node, site.tensor))
        ]

    layers = named(site for site in survey.sites if site.layer)
    return layers or _module_hits(survey, pattern) or named(survey.sites)


def _module_hits(survey: Survey, pattern: str) -> list[Choice]:
    for match in (_matcher(pattern, "."), _matcher("**." + pattern, ".")):
        paths = [path for path in survey.modules.paths if match(path)]
        hits = {c.site.address: c for path in paths for c in _module_choices(survey, path)}
        if hits:
            return list(hits.values())
    return []


def _matcher(pattern: str, separator: str) -> Callable[[str], bool]:
    parts = {"**": ".*", "*": f"[^{re.escape(separator)}]*", "?": "."}
    pieces = re.split(r"(\*\*|\*|\?)", pattern)
    text = "".join(parts.get(piece) or re.escape(piece) for piece in pieces)
    expression = re.compile(text, re.DOTALL)
    return lambda name: expression.fullmatch(name) is not None


def _usable(survey: Survey, choice: Choice) -> Choice:
    site = choice.site
    if site.refused is None:
        return choice
    hint = "`onnx-adapt sites` lists the places that can take one"
    others = [s for s in survey.layers_of.get((site.graph, site.core), ()) if not s.refused]
    if site.graph not in survey.index.views:
        hint = INLINE_HINT
    elif others:
        hint = f"another output of the node can: --after '{others[0].address}'"
    raise SiteRefusedError(
        f"{site.node or site.op} ({site.op}), tensor {site.tensor!r}, cannot take an "
        f"adapter: {site.refused}",
        hint=hint,
    )


def _none_usable(survey: Survey, pattern: str, hits: Sequence[Choice]) -> SiteError:
    if not hits:
        return _not_found(survey, pattern)
    reasons = "; ".join(f"{c.site.tensor}: {c.site.refused}" for c in hits[:_SHOWN])
    return SiteRefusedError(
        f"nothing that {pattern!r} matches can take an adapter: {reasons}",
        hint="`onnx-adapt sites` lists the places that can take one",
    )


def _ambiguous(name: str, sites: Sequence[Site]) -> AmbiguousSiteError:
    return AmbiguousSiteError(
        f"{name!r} means {len(sites)} places: {_listing(sites)}",
        hint="name one by its address, or all with a glob",
    )


def _listing(sites: Sequence[Site]) -> str:
    shown = ", ".join(site.address for site in sites[:_SHOWN])
    return shown + (", ..." if len(sites) > _SHOWN else "")


def _not_found(survey: Survey, name: str) -> SiteNotFoundError:
    main = survey.index.main
    if name in main.types and name not in main.producers:
        kind = "a weight" if name in main.constants else "an input"
        return SiteNotFoundError(
            f"{name!r} is {kind} of the model; an adapter goes after a node",
            hint="name the node that reads it, or see `onnx-adapt sites`",
        )
    near = nearest(name, [label for site in survey.sites for label in _labels(site)])
    hint = f"nearest: {', '.join(near)}" if near else "see `onnx-adapt sites` for all names"
    return SiteNotFoundError(f"no node, tensor or module is called {name!r}", hint=hint)


def nearest(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """The known names most like `name`: those that contain it first, then by spelling."""
    names = list(dict.fromkeys(label for label in known if label))
    tail = re.split(r"[./]", name.strip("*/."))[-1]
    within = [n for n in names if name in n] or [n for n in names if tail and tail in n]
    close = difflib.get_close_matches(name, (within or names)[:4000], count, 0.5)
    return list(dict.fromkeys([*close, *within[:count]]))[:count]
