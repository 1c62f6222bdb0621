"""Find parameters that modules use without a layer: recurrent weights, stacked experts.

`lstm.weight_hh_l1_reverse` is one half of an input of the LSTM node of the second layer; the
node tells its layer by its place among those of its module. `experts.gate_up_proj` is a tensor
of three axes that the nodes of the module `experts` read; exporters seldom keep its name, so
its shape tells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import onnx

from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight
from onnx_adapt.dtypes import FLOATS
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.contractions import summed_axis
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.sites import Survey

RECURRENT = {
    # PyTorch's gates of an LSTM are input, forget, cell, output; ONNX's i, o, f, c.
    "LSTM": (0, 3, 1, 2),
    # Of a GRU PyTorch has reset, update, new; ONNX z (update), r, h.
    "GRU": (1, 0, 2),
    "RNN": (),
}
"""Recurrent operators, and PyTorch's blocks of rows in the order in which each has them."""

_NAME = re.compile(r"weight_(?P<which>ih|hh)_l(?P<layer>\d+)(?P<reverse>_reverse)?")


def recurrent_weights(survey: Survey, module: str, parameter: str) -> list[InnerWeight]:
    """Find a weight of a recurrent layer; empty if the parameter is of no such layer.

    Args:
        survey: The survey of the model.
        module: The module's path in the graph.
        parameter: PyTorch's name, such as `weight_ih_l0_reverse`.

    Raises:
        CheckpointError: If the module has no node of such a layer, not as many layers, or
            only one direction.
    """
    match = _NAME.fullmatch(parameter)
    nodes = [(v, n) for v, n in _inside(survey, module) if n.op_type in RECURRENT]
    if match is None:
        return []
    if not nodes:
        kinds = sorted({node.op_type for _, node in _inside(survey, module)})
        raise CheckpointError(
            f"module {module!r} of the graph has no LSTM, GRU or RNN node, of which "
            f"{parameter!r} could be a weight; it has {', '.join(kinds)}",
            hint="an exporter that unrolls the layer needs --base-weights, which finds its "
            "weights by value; insert before the model is quantised",
        )
    position = 1 if match["which"] == "ih" else 2
    layers: dict[tuple[object, ...], list[tuple[GraphView, onnx.NodeProto]]] = {}
    for view, node in nodes:
        layers.setdefault(_identity(survey, view, node), []).append((view, node))
    number, reverse = int(match["layer"]), bool(match["reverse"])
    calls = list(layers.values())[number] if number < len(layers) else []
    if not calls or (reverse and _direction(calls[0][1]) != "bidirectional"):
        raise CheckpointError(
            f"module {module!r} of the graph has {len(layers)} recurrent layers "
            f"({_direction(nodes[0][1])}), and no {parameter!r}",
            hint="is it an adapter for another size of this model?",
        )
    return [
        InnerWeight(
            f"{module}.{parameter.removesuffix('_reverse')}",
            view,
            node,
            position,
            in_out=False,
            group=int(reverse),
            order=RECURRENT[node.op_type],
        )
        for view, node in calls
    ]


_EXPERTS = {
    "MoE": "which computes its experts with kernels of its own",
    "QMoE": "whose experts are stored as 4-bit or 8-bit integers",
}
"""Mixtures of experts of ONNX Runtime, and why their weights take no adapter."""


def refuse_inner_experts(survey: Survey, modules: Iterable[str]) -> None:
    """Refuse experts that are inside ONNX Runtime's MoE or QMoE.

    Args:
        survey: The survey of the model.
        modules: The modules of a checkpoint.

    Raises:
        CheckpointError: If a module is one of those experts.
    """
    nodes = [
        (scope or "", node)
        for path, view in survey.index.views.items()
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True)
        if node.op_type in _EXPERTS and node.domain == "com.microsoft"
    ]
    for module in modules if nodes else ():
        layer, inside, _ = f"{module}.".partition(".experts.")
        layer = layer.rpartition(".")[0]
        for scope, node in nodes if inside else ():
            if not scope or not layer or f"{scope}.".startswith(f"{layer}."):
                raise CheckpointError(
                    f"module {module!r} is inside node {text(node.name)!r} ({node.op_type}), "
                    f"{_EXPERTS[node.op_type]}",
                    hint="adapt the model as PyTorch's exporter writes it, or train the "
                    "adapter without the experts",
                )


def _inside(survey: Survey, module: str) -> Iterator[tuple[GraphView, onnx.NodeProto]]:
    for path, places in survey.modules.members.get(module, {}).items():
        view = survey.index.views[path]
        yield from ((view, view.nodes[i]) for i in places)


def _identity(survey: Survey, view: GraphView, node: onnx.NodeProto) -> tuple[object, ...]:
    """What the calls of one layer have in common: the values of its weights."""
    weights = [(name, view.weight(name)) for name in node.input[1:3]]
    return tuple(
        survey.modules.values.of(weight.tensor) if weight else name for name, weight in weights
    )


def _direction(node: onnx.NodeProto) -> str:
    found = (a.s.decode() for a in node.attribute if a.name == "direction")
    return next(found, "forward")


def stacked_weights(
    survey: Survey, module: str, parameter: str, shape: tuple[int, int, int], *, known: bool
) -> list[InnerWeight]:
    """Find a stack of matrices that the nodes of a module read.

    Args:
        survey: The survey of the model.
        module: The module's path in the graph.
        parameter: Its name in the module.
        shape: How many matrices, and what the adapter makes and reads: `(groups, out, in)`.
        known: Whether `in` is what the module sums over, where `out` is as large.

    Raises:
        CheckpointError: If there is none, or several could be the one.
    """
    groups, computes, reads = shape
    wanted = {(groups, computes, reads), (groups, reads, computes)}
    stacks = _constants(survey, module, axes=3)
    alike = {name: weights for name, weights in stacks.items() if _dims(weights[0]) in wanted}
    own = [name for name in alike if _leaf(alike[name][0]) == parameter]
    rest = [name for name in alike if not _is_named(module, alike[name][0])]
    found = own or rest
    if len(found) != 1:
        raise _not_one(module, parameter, shape, stacks, found)
    weights = alike[found[0]]
    in_out = _dims(weights[0])[1:] == (reads, computes)
    if reads == computes:
        axis = summed_axis(weights[0].view, found[0]) if known else None
        if axis is None:
            raise CheckpointError(
                f"parameter '{module}.{parameter}' has square matrices, and neither the "
                "checkpoint nor the graph tells which of their axes is the input",
                hint="merge the adapter in PyTorch and export again",
            )
        in_out = axis == -2
    name = f"{module}.{parameter}"
    return [InnerWeight(name, w.view, w.node, w.position, in_out=in_out) for w in weights]


def matrix_weights(
    survey: Survey, module: str, parameter: str, shape: tuple[int, int]
) -> list[InnerWeight]:
    """Find a matrix that the nodes of a module read, and that kept its name.

    Its shape alone would not tell it from the weights of Linears.

    Args:
        survey: The survey of the model.
        module: The module's path in the graph.
        parameter: Its name in the module.
        shape: What the adapter makes and reads, which are the axes of PyTorch's parameter.

    Raises:
        CheckpointError: If there is none, or several.
    """
    constants = _constants(survey, module, axes=2)
    own = {name: w for name, w in constants.items() if _leaf(w[0]) == parameter}
    found = [name for name in own if sorted(_dims(own[name][0])) == sorted(shape)]
    if len(found) != 1:
        raise _not_one(module, parameter, shape, own, found)
    weights = own[found[0]]
    in_out = _dims(weights[0]) != shape
    name = f"{module}.{parameter}"
    return [InnerWeight(name, w.view, w.node, w.position, in_out=in_out) for w in weights]


def _constants(survey: Survey, module: str, *, axes: int) -> dict[str, list[InnerWeight]]:
    """The constant floats of so many axes that the nodes of a module read, with their readers.

    Of a constant that is read through Cast or Transpose the first float counts.
    """
    found: dict[str, list[InnerWeight]] = {}
    made: set[str] = set()
    for view, node in _inside(survey, module):
        for position, name in enumerate(node.input):
            weight = view.weight(name) if name else None
            if weight is None or len(weight.dims) != axes or weight.elem_type not in FLOATS:
                continue
            found.setdefault(name, []).append(InnerWeight(module, view, node, position))
            made.update(node.output)
    return {name: weights for name, weights in found.items() if name not in made}


def _dims(weight: InnerWeight) -> tuple[int, ...]:
    stored = weight.view.weight(weight.tensor)
    return stored.dims if stored else ()


def _leaf(weight: InnerWeight) -> str:
    """The last part of the name of the stored tensor."""
    stored = weight.view.weight(weight.tensor)
    return text(stored.tensor.name).rpartition(".")[2] if stored else ""


def _is_named(module: str, weight: InnerWeight) -> bool:
    """Whether the stored tensor has the name of a parameter of the module."""
    stored = weight.view.weight(weight.tensor)
    around = text(stored.tensor.name).rpartition(".")[0] if stored else ""
    return bool(around) and f".{module}".endswith(f".{around}")


def _not_one(
    module: str,
    parameter: str,
    shape: Sequence[int],
    stacks: dict[str, list[InnerWeight]],
    found: Sequence[str],
) -> CheckpointError:
    listed = ", ".join(f"{name!r} {list(_dims(w[0]))}" for name, w in stacks.items())
    if found:
        return CheckpointError(
            f"parameter '{module}.{parameter}' {list(shape)} can be any of {', '.join(found)} "
            "in the graph",
            hint="export the base so that it keeps the names of parameters",
        )
    return CheckpointError(
        f"parameter '{module}.{parameter}' {list(shape)} was not found; the nodes of the "
        f"module read {listed or 'no tensor that it could be'}",
        hint="an exporter that unrolls a loop over experts cuts their stack into pieces, and "
        "constants lose their names: --base-weights finds them by value",
    )
