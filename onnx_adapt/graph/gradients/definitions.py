"""Operators of ONNX that ONNX itself defines by others: their nodes, from its own tables."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import defs, helper

from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.gradients.tape import Tape


def defined(node: onnx.NodeProto, opset: int) -> bool:
    """Whether ONNX defines an operator by others of this operator set, or of an older one."""
    schema = _schema(node, opset)
    if schema is None:
        return False
    plain, by_context = (
        schema.function_opset_versions,
        schema.context_dependent_function_opset_versions,
    )
    return any(version <= opset for version in (*plain, *by_context))


def _schema(node: onnx.NodeProto, opset: int) -> Any:
    """ONNX's entry of an operator; its type stubs lack the functions."""
    if node.domain not in ("", "ai.onnx") or not defs.has(node.op_type, opset):
        return None
    return defs.get_schema(node.op_type, opset)


def write_definition(tape: Tape, step: Step) -> str:
    """Add the nodes that ONNX defines an operator by, and return the first output."""
    schema = _schema(step.node, tape.opset)
    assert schema is not None
    body = _body(tape, step, schema)
    names = {name: tape.prefix + name for node in body.node for name in node.output if name}
    given = [*step.node.input, *[""] * len(body.input)]
    names |= {"": "", **dict(zip(body.input, given, strict=False))}
    own = {item.name: item for item in step.node.attribute}
    for position, inner in enumerate(body.node):
        node = onnx.NodeProto()
        node.CopyFrom(inner)
        node.name = f"{tape.prefix}{position}:{node.op_type}"
        node.input[:] = [names[name] for name in inner.input]
        node.output[:] = [names[name] for name in inner.output]
        del node.attribute[:]
        node.attribute.extend(
            item for given in inner.attribute if (item := _attribute(given, own, schema))
        )
        tape.nodes.append(node)
    return str(names[body.output[0]])


def _attribute(
    item: onnx.AttributeProto, own: dict[str, onnx.AttributeProto], schema: Any
) -> onnx.AttributeProto | None:
    """An attribute of a node in a definition; some are those of the defined node."""
    if not item.ref_attr_name:
        return item
    source = own.get(item.ref_attr_name)
    if source is None and item.ref_attr_name in schema.attributes:
        source = schema.attributes[item.ref_attr_name].default_value
    if source is None or not source.type:
        return None
    copy = onnx.AttributeProto()
    copy.CopyFrom(source)
    copy.name = item.name
    return copy


def _body(tape: Tape, step: Step, schema: Any) -> onnx.FunctionProto:
    plain = [v for v in schema.function_opset_versions if v <= tape.opset]
    if plain:
        return _parsed(schema.get_function_with_opset_version(max(plain)))
    versions = [v for v in schema.context_dependent_function_opset_versions if v <= tape.opset]
    types = [
        helper.make_tensor_type_proto(
            tape.elem_type(name), tape.view.type_of(name).shape
        ).SerializeToString()
        if name
        else b""
        for name in step.node.input
    ]
    text = schema.get_context_dependent_function_with_opset_version(
        max(versions), step.node.SerializeToString(), types
    )
    return _parsed(text)


def _parsed(text: bytes) -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.ParseFromString(text)
    return function
