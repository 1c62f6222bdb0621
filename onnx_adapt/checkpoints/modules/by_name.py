"""Find modules by what exporters leave in a graph: scopes, and names of weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx

from onnx_adapt.checkpoints.modules.calls import (
    ParameterInput,
    is_attention_projection,
    refuse_uncalled,
)
from onnx_adapt.checkpoints.modules.inner_weights import InnerWeight, InnerWeights
from onnx_adapt.checkpoints.modules.packed import PackedLayer
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.fused_bias import bias_behind
from onnx_adapt.graph.index import GraphView, text
from onnx_adapt.graph.layer_calls import LayerCall
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.modules import module_output
from onnx_adapt.graph.operators import OPERATORS
from onnx_adapt.graph.sites import Survey

_SHOWN = 3
_INTEGERS = ("QLinearMatMul", "QLinearConv", "QGemm", "QAttention")
"""Layers of the QOperator format, whose outputs are integers that others read."""
_NORMS = (
    *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
    "GroupNormalization",
)


@dataclass(frozen=True, slots=True)
class ByName:
    """Finds modules by their paths.

    Attributes:
        survey: The survey of the model.
        packed: The layers that modules are computed in together with others.
        inner: The weights of modules inside operators.
    """

    survey: Survey
    packed: Mapping[str, list[PackedLayer]]
    inner: InnerWeights

    def known(self) -> list[str]:
        """The paths of all modules that the graph has nodes of."""
        return [*self.survey.modules.paths, *self.packed, *self.inner.paths]

    def inner_weights(self, module: str) -> Sequence[InnerWeight]:
        """The weights of a module inside operators, one for each node that computes it."""
        return self.inner.of(module)

    def parameter(self, _name: str) -> None:
        """None: names and shapes tell what a parameter is in the graph."""

    def stored(self) -> list[str]:
        """The modules whose weights have kept their names."""
        return _named_parameters(self.survey)

    def calls(self, module: str, *, called: bool = True) -> list[LayerCall]:
        """The calls of a module, in graph order; several if it runs several times."""
        found: list[LayerCall] = []
        for path, view in self.survey.index.views.items():
            scopes = self.survey.modules.scopes[path]
            for scope, node in zip(scopes, view.nodes, strict=True):
                if scope == module and is_module_call(view, node):
                    call = self.survey.call(view, node)
                    if call is not None:
                        _refuse_folded(call, module)
                        found.append(call)
        found = found or [layer.part(module) for layer in self.packed.get(module, ())]
        return found or _calls_by_name(self.survey, module, called)

    def is_uncalled(self, module: str) -> bool:
        """Whether a module's weight is used by the torch.nn.MultiheadAttention around it.

        The node that reads the weight is in the scope of the attention then.
        """
        around = module.rpartition(".")[0]
        names = (name for view in self.survey.index.views.values() for name in view.constants)
        return is_attention_projection(module, names) and any(
            scope is not None and f".{around}".endswith(f".{scope}")
            for _, scope in _layers_named(self.survey, module)
        )

    def norm_inputs(self, module: str, parameter: str) -> list[ParameterInput]:
        """Where a parameter of a normalisation enters the graph."""
        found: list[ParameterInput] = []
        for path, view in self.survey.index.views.items():
            scopes = self.survey.modules.scopes[path]
            inside = [n for s, n in zip(scopes, view.nodes, strict=True) if s == module]
            found += _norm_inputs(view, inside, parameter)
        return found

    def output(self, module: str) -> list[tuple[GraphView, str]]:
        """The tensors that a module passes to the rest of the model, each with its graph."""
        return module_output(self.survey.modules, module)

    def missing(self, module: str) -> CheckpointError:
        """The error that says why a module has no calls."""
        nodes = [
            self.survey.index.views[path].nodes[i]
            for path, inside in self.survey.modules.members.get(module, {}).items()
            for i in inside
        ]
        integers = [node for node in nodes if node.op_type in _INTEGERS]
        listed = ", ".join(
            f"{text(n.name)!r} ({n.op_type})" for n in integers or nodes[:_SHOWN]
        )
        if integers:
            return CheckpointError(
                f"module {module!r} is computed in integers, and no float tensor of it is in "
                f"the graph: {listed} reads and makes 8-bit integers",
                hint="quantise the model in the QDQ format instead of QOperator, or insert "
                "the adapter into the float model and quantise the result",
            )
        return CheckpointError(
            f"module {module!r} is in the graph, but no MatMul, Gemm, Conv or Gather of it "
            f"whose product is a float{f'; its nodes are {listed}' if listed else ''}",
            hint="was the model optimised or quantised? insert into it as exported",
        )


def _refuse_folded(call: LayerCall, module: str) -> None:
    """Refuse a Conv without its name: TorchScript drops it where it folds a BatchNorm in."""
    if OPERATORS[call.node.op_type].convolves and _weight_name(call).startswith("onnx::"):
        raise CheckpointError(
            f"node {call.node.name!r} of module {module!r} has another weight than the "
            "module: the exporter folded the BatchNorm behind it in",
            hint="export with training=TrainingMode.PRESERVE or optimize=False, so that the "
            "BatchNorm stays",
        )


def _calls_by_name(survey: Survey, module: str, called: bool) -> list[LayerCall]:
    """Find the layers whose stored weight or bias still has the module's name.

    Raises:
        CheckpointError: If they are of other modules: an exporter folded a BatchNorm into
            the weight, or the weight is used without a call of its module.
    """
    found = _layers_named(survey, module)
    # TorchScript leaves a ModuleDict's name out of the scopes of what is in it.
    own = [
        call
        for call, scope in found
        if scope is None
        or f".{module}".endswith(f".{scope}")
        or (not called and _holds(module, scope))
    ]
    if found and not own:
        call, scope = found[0]
        raise CheckpointError(
            f"the weight of module {module!r} is in node {call.node.name!r}, which is of "
            f"{f'module {scope!r}' if scope else 'the model itself'}",
            hint=_ONE_TABLE.format(module, scope)
            if scope and OPERATORS[call.node.op_type].embeds
            else "it was folded with a BatchNorm (export with optimize=False), or PyTorch "
            "uses it without calling the module, so that an adapter there has no effect",
        )
    if called and own:
        refuse_uncalled(module, (n for v in survey.index.views.values() for n in v.constants))
        for call in [call for call, scope in found if scope is None]:
            _refuse_unsure(call, module)
    return own


_ONE_TABLE = (
    "PyTorch calls the embedding by its other name: LoRA and modules_to_save have no effect "
    "there; trained tokens have: --map {}={} for an adapter with these alone or beside LoRA"
)
"""T5 and BART have one table as `shared` and `encoder.embed_tokens`, and call the latter."""


def _layers_named(survey: Survey, module: str) -> list[tuple[LayerCall, str | None]]:
    """The layers whose stored weight or bias has a module's name, each with its scope."""
    found: list[tuple[LayerCall, str | None]] = []
    for path, view in survey.index.views.items():
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            if not is_module_call(view, node):
                continue
            call = survey.call(view, node)
            if call is None:
                continue
            named = f"{module}.bias" in _bias_names(survey, call)
            if named or _weight_name(call) == f"{module}.weight":
                found.append((call, scope))
    return found


def _bias_names(survey: Survey, call: LayerCall) -> list[str]:
    """The tensors that may be the bias of a call: in its node, in an Add, or fused behind."""
    bias = OPERATORS[call.node.op_type].bias
    inside = [] if bias is None else list(call.node.input[bias : bias + 1])
    adds = [node for node in call.view.readers(call.raw) if node.op_type == "Add"]
    behind = bias_behind(survey.index, call.view, call.output, call.sizes[1])
    fused = [behind.bias] if behind else []
    added = [find_weight(call.view, name) for add in adds for name in add.input]
    return [*inside, *(weight.tensor.name for weight in added if weight), *fused]


def _refuse_unsure(call: LayerCall, module: str) -> None:
    """Refuse a Conv without a scope: a BatchNorm may have changed its weight, not its name."""
    operator = OPERATORS[call.node.op_type]
    has_bias = operator.has_bias(call.node) or call.output != call.raw
    if operator.convolves and has_bias:
        raise CheckpointError(
            f"the graph does not tell whether a BatchNorm was folded into {call.node.name!r}, "
            f"the convolution of module {module!r}",
            hint="give the base's weights with --base-weights model.safetensors, or insert "
            "the adapter into the model as exported",
        )


def _holds(one: str, other: str) -> bool:
    """Whether one of two modules contains the other, so that it may use its weights."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _named_parameters(survey: Survey) -> list[str]:
    """List the modules whose stored weight or bias has their name: `X` for `X.weight`."""
    names = (name for view in survey.index.views.values() for name in view.constants)
    return [
        module
        for module, _, parameter in (name.rpartition(".") for name in names)
        if parameter in ("weight", "bias") and module
    ]


def _weight_name(call: LayerCall) -> str:
    weight = find_weight(call.view, call.weight)
    return weight.tensor.name if weight else ""


def _refuse_shifted(node: onnx.NodeProto) -> None:
    """Refuse a norm of onnxruntime-genai's builder, which stores Gemma's weight as 1 + weight.

    It keeps the name of the weight, and calls its nodes `/model/.../LayerNorm`.
    """
    if text(node.name).rpartition("/")[2] in ("LayerNorm", "SkipLayerNorm"):
        raise CheckpointError(
            f"the builder of onnxruntime-genai made node {text(node.name)!r}, and may have "
            "added 1 to its weight, so a trained weight cannot replace it",
            hint="train the adapter without modules_to_save for the norms, or merge the norms "
            "in PyTorch and build the model again",
        )


_SUM = re.compile(r"(.*/)?[Aa]dd(_\d+)?(_output_0)?")
"""What a folded sum is called after the node that made it: `add_4`, `/norm/Add_output_0`."""

# How a normalisation that multiplies by 1 + weight is found, by example (Gemma):
#
#     as exported     s = Add(norm.weight, 1)    y = Mul(x, s)     the Add reads the weight
#     folded          y = Mul(x, add_4)                            add_4 is 1 + weight
#
# The trained weight replaces what the Add reads, or 1 is added to it.


def _norm_inputs(
    view: GraphView, nodes: list[onnx.NodeProto], parameter: str
) -> list[ParameterInput]:
    """Find a normalisation's weight or bias, in one node or in the Mul and Add of several."""
    position = 1 if parameter == "weight" else 2
    whole = [n for n in nodes if n.op_type in _NORMS and len(n.input) > position]
    for node in whole:
        _refuse_shifted(node)
    if whole:
        return [_norm_input(view, node, position, parameter) for node in whole]
    # Exporters make GroupNorm of this, and give the weight axes of 1 and a name of its own.
    by_group = any(node.op_type == "InstanceNormalization" for node in nodes)
    for op in ("Mul", "Add") if parameter == "weight" else ("Add",):
        for node in reversed([node for node in nodes if node.op_type == op]):
            for i, name in enumerate(node.input):
                weight = find_weight(view, name)
                dims = weight.dims if weight else ()
                if weight is None or not 1 < max(dims, default=0) == prod(dims):
                    continue  # it is no vector
                if len(dims) == 1 and _is_named(weight.tensor.name, op, parameter):
                    return [_norm_input(view, node, i, parameter)]
                if len(dims) > 1 and by_group and op == _NORM_OPS[parameter]:
                    return [ParameterInput(view, node, i, False)]
    return []


_NORM_OPS = {"weight": "Mul", "bias": "Add"}
"""The operator that applies each parameter of a normalisation in several nodes."""


def _is_named(name: str, op: str, parameter: str) -> bool:
    """Whether a vector is a parameter by its name, or a weight that was computed."""
    computed = _SUM.fullmatch(name) is not None or name.startswith("onnx::")
    return name.endswith(f".{parameter}") or (op == "Mul" and computed)


def _norm_input(
    view: GraphView, node: onnx.NodeProto, position: int, parameter: str
) -> ParameterInput:
    """Describe where a parameter of a normalisation enters, as it is or as a sum.

    Raises:
        CheckpointError: If TorchScript computed it, which drops its name.
    """
    weight = find_weight(view, str(node.input[position]))
    name = weight.tensor.name if weight else ""
    if name.startswith("onnx::"):
        raise CheckpointError(
            f"the exporter computed the {parameter} of node {text(node.name)!r}, so a trained "
            "one cannot replace it: it may be 1 + weight, as Gemma's",
            hint="give the base's weights with --base-weights model.safetensors",
        )
    added = 1.0 if parameter == "weight" and _SUM.fullmatch(name) else 0.0
    return ParameterInput(view, node, position, False, added)
