"""Operators without a rule between weights and a loss, and what trains all the same."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.backward import DOMAINS, FLAT, nodes_on_way, way_back
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.table import RULES
from onnx_adapt.graph.index import ModelIndex
from onnx_adapt.graph.layers import is_layer
from onnx_adapt.model import walk
from onnx_adapt.slot.manifest import slot_of
from onnx_adapt.slot.names import split_weight

_MOST = 3
"""How many names a message lists."""


def refuse_missing(index: ModelIndex, loss: str, weights: Sequence[str]) -> None:
    """Refuse weights whose way to a loss goes through an operator without a rule.

    Args:
        index: The forward model with its loss.
        loss: A tensor of its main graph.
        weights: What is to be differentiated for.

    Raises:
        GradientError: If there is such an operator. It names the slots that train, or where
            in the graph one would.
    """
    missing = _missing(index, loss, weights)
    if not missing:
        return
    first = missing[0]
    kinds = sorted({node.op_type for node in missing} - {first.op_type})
    more = f", nor for {', '.join(kinds)}" if kinds else ""
    raise GradientError(
        f"there is no gradient for operator {first.op_type} "
        f"(node {Step(first, (), ()).label}){more}",
        hint=_what_trains(index, loss, weights),
    )


def _missing(index: ModelIndex, loss: str, weights: Sequence[str]) -> list[onnx.NodeProto]:
    """The nodes between weights and a loss that have no rule."""
    way = nodes_on_way(index.views, index.main, [loss], weights)
    return [node for _, node in way if not _has_rule(node)]


def _has_rule(node: onnx.NodeProto) -> bool:
    return node.domain in DOMAINS and node.op_type in RULES


def _what_trains(index: ModelIndex, loss: str, weights: Sequence[str]) -> str:
    clear = [weight for weight in weights if not _missing(index, loss, [weight])]
    slots = dict.fromkeys(found[0] for weight in clear if (found := split_weight(weight)))
    if slots:
        return f"without the others train {_listed(list(slots))}"
    sites = _sites_behind(index, loss)
    if sites:
        return f"slots behind it train, such as at {_listed(sites)}"
    return "no layer is behind it, so no slot trains with this output"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _MOST
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(map(repr, names[:_MOST])) + more


def _sites_behind(index: ModelIndex, loss: str) -> list[str]:
    """The layers from which every way to the loss has rules, in their order."""
    view = index.main
    blocked: set[str] = set()
    nodes = way_back(view, [loss], view.inferred).nodes
    for node in reversed(nodes):
        through = any(name in blocked for name in node.output)
        if through or _lacks_rule(node):
            blocked.update(node.input)
    return [
        str(node.output[0])
        for node in nodes
        if is_layer(view, node) and not slot_of(node) and node.output[0] not in blocked
    ]


def _lacks_rule(node: onnx.NodeProto) -> bool:
    """Whether a node, or one in its bodies, has no rule and needs one."""
    inner = (item for _, body in walk.bodies(node) for item in body.node)
    lacks = node.op_type not in FLAT and not _has_rule(node) and node.op_type != "Constant"
    return lacks or any(map(_lacks_rule, inner))
