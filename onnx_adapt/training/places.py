"""Where to put slots if nobody says where: the output layer of each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_adapt.errors import SiteError
from onnx_adapt.graph.index import GraphView
from onnx_adapt.graph.layer_calls import layer_call
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.site import Site
from onnx_adapt.graph.sites import survey_model
from onnx_adapt.model.file import Model

_SUMS = ("Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
"""What adds a block's result to what the block began with."""

_PASSING = ("Reshape", "Cast", "Identity", "Dropout")
"""What may stand between a layer and such a sum."""

LAST = 4
"""How many layers are taken where there are no blocks."""


def usual_places(model: Model) -> list[str]:
    """The usual places for slots: the addresses of the output layer of each block.

    A block adds its result to what it began with. Of a Transformer's two in each layer the
    feed-forward one is taken, as Pfeiffer et al. (2020) do: its output layer reads more
    features than it makes. Without such blocks it is the last layers before the outputs.

    Args:
        model: A model without slots.

    Raises:
        SiteError: If no layer can take a slot.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/bases/bert_headless/base.onnx")
        >>> len(usual_places(base))
        2
    """
    survey = survey_model(model)
    layers = [site for site in survey.layers if site.reason is None]
    if not layers:
        raise SiteError(f"no layer of {model.label} can take a slot")
    outputs = survey.index.main.outputs
    inner = [site for site in layers if site.tensor not in outputs]
    found = _block_ends(survey.index.views, layers) or inner[-LAST:] or layers[-1:]
    return [site.address for site in found]


def block_places(model: Model) -> list[str]:
    """Those of `usual_places` that end a block; none in a model without blocks."""
    survey = survey_model(model)
    layers = [site for site in survey.layers if site.reason is None]
    return [site.address for site in _block_ends(survey.index.views, layers)]


def _block_ends(views: Mapping[str, GraphView], layers: Sequence[Site]) -> list[Site]:
    ends = [site for site in layers if _ends_block(views[site.graph], site)]
    return [site for site in ends if _narrows(views[site.graph], site)] or ends


def _ends_block(view: GraphView, site: Site) -> bool:
    """Whether a layer's output is added to a tensor that is not constant."""
    if OPERATORS[site.op].embeds:
        return False
    reached = [site.tensor]
    for tensor in reached:
        for node in view.readers(tensor):
            summed = node.op_type in _SUMS and tensor in node.input[:2]
            if summed and all(view.constant(name) is None for name in node.input[:2]):
                return True
            if node.op_type in _PASSING and tensor == node.input[0]:
                reached += node.output[:1]
    return False


def _narrows(view: GraphView, site: Site) -> bool:
    """Whether a layer reads more features than it makes."""
    call = layer_call(view, view.nodes[site.node_index], {})
    if call is None:
        return False
    reads, makes = call.sizes
    return reads > makes
