"""The site that a name means, and the errors where it cannot take an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx_adapt.errors import (
    AmbiguousSiteError,
    SiteError,
    SiteRefusedError,
)
from onnx_adapt.graph.fused_bias import unfused_hint
from onnx_adapt.graph.site import Site
from onnx_adapt.graph.sites import Survey

_SHOWN = 8

INLINE_HINT = "--inline-functions inlines the model's functions first"


@dataclass(frozen=True, slots=True)
class Choice:
    """A site and the name a slot there should have.

    Attributes:
        site: The site.
        name: What the slot is called, before it is made unique.
        literal: Whether the tensor itself was named, and no layer or module.
        further: The sites after the module's other calls, where the same slot goes.
    """

    site: Site
    name: str
    literal: bool = False
    further: tuple[Site, ...] = ()

    @property
    def refused(self) -> str | None:
        """Why no adapter can go there, or None."""
        return self.site.refused if self.literal else self.site.reason


SITES_HINT = "`onnx-adapt sites` lists the places that can take one"


def require_usable(survey: Survey, choice: Choice) -> Choice:
    """The place that one name means.

    Raises:
        SiteRefusedError: If it cannot take an adapter.
    """
    site = choice.site
    if choice.refused is None:
        return choice
    if site.refused is None:
        hint = unfused_hint(site.address)
    elif site.graph not in survey.index.views:
        hint = INLINE_HINT
    elif other := _other_output(survey, site):
        hint = f"another output of the node can: --after '{other.address}'"
    else:
        hint = _axis_hint(survey, site) or SITES_HINT
    raise SiteRefusedError(
        f"{site.node or site.op} ({site.op}), tensor {site.tensor!r}, cannot take an "
        f"adapter: {choice.refused}",
        hint=hint,
    )


def _axis_hint(survey: Survey, site: Site) -> str:
    """How to name the feature axis of a site, or not to; '' if that is no help."""
    told = survey.site(survey.index.views[site.graph], site.tensor)
    if told.refused is None:
        return f"leave out the axis: the operators around it say {told.axis}"
    if site.axis is not None:
        return ""
    laid = [survey.on_axis(site, axis) for axis in (-1, 1)]
    good = [f"--axis {at.axis} ({at.width} wide)" for at in laid if at.refused is None]
    return f"if you know it, say so: {' or '.join(dict.fromkeys(good))}" if good else ""


def _other_output(survey: Survey, site: Site) -> Site | None:
    """Another output of a site's node, one that can take an adapter."""
    view = survey.index.views[site.graph]
    names = [
        survey.after_slots(site.graph, name)
        for name in view.nodes[site.node_index].output
        if name
    ]
    others = (survey.site(view, name) for name in names if name != site.tensor)
    return next((other for other in others if other.refused is None), None)


def none_usable(survey: Survey, pattern: str, hits: Sequence[Choice]) -> SiteError:
    """The error where a glob matches places, and none of them can take an adapter."""
    reasons = "; ".join(f"{c.site.tensor}: {c.refused}" for c in hits[:_SHOWN])
    fused = [hit.site.address for hit in hits if hit.site.refused is None]
    hidden = any(hit.site.graph not in survey.index.views for hit in hits)
    return SiteRefusedError(
        f"nothing that {pattern!r} matches can take an adapter: {reasons}",
        hint=INLINE_HINT if hidden else unfused_hint(fused[0]) if fused else SITES_HINT,
    )


def ambiguous(name: str, sites: Sequence[Site]) -> AmbiguousSiteError:
    """The error where a name that is no glob means several places."""
    return AmbiguousSiteError(
        f"{name!r} means {len(sites)} places: {listing(sites)}",
        hint="name one by its address, or all with a glob",
    )


def listing(sites: Sequence[Site]) -> str:
    """The addresses of the first few of some sites, for a message."""
    shown = ", ".join(site.address for site in sites[:_SHOWN])
    return shown + (", ..." if len(sites) > _SHOWN else "")
