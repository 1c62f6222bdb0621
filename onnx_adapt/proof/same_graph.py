"""The checks that run nothing: the interface, the graph without slots, the ONNX checker."""

from __future__ import annotations

import onnx

from onnx_adapt.edit.damage import foreign_readers
from onnx_adapt.edit.insert import inline_model
from onnx_adapt.edit.remove import remove, written_out_base
from onnx_adapt.edit.unfuse import changed_parts
from onnx_adapt.graph.index import read_type
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.proof.checker import new_complaints
from onnx_adapt.proof.result import Check
from onnx_adapt.slot.manifest import Manifest
from onnx_adapt.words import count


def check_interface(
    base: onnx.ModelProto, adapted: onnx.ModelProto, manifest: Manifest
) -> Check:
    """The same inputs and outputs by name, type and shape, but for weights and heads."""
    own = {name for slot in manifest.slots for name in slot.inputs}
    own |= {weight.name for weight in manifest.weights}
    heads = {head.name for head in manifest.heads}
    sides = []
    for proto in (base, adapted):
        stored = {tensor.name for tensor in proto.graph.initializer} if own else set()
        ins = [v for v in proto.graph.input if v.name not in own | stored]
        outs = [v for v in proto.graph.output if proto is base or v.name not in heads]
        sides.append({"input": ins, "output": outs})
    wrong = []
    for kind in ("input", "output"):
        theirs, ours = (
            {v.name: (read_type(v), v.type.SerializeToString()) for v in side[kind]}
            for side in sides
        )
        wrong += [f"{kind} {name!r} is gone" for name in theirs if name not in ours]
        wrong += [f"{kind} {name!r} is new" for name in ours if name not in theirs]
        wrong += [
            f"{kind} {name!r} was {theirs[name][0]} and is {ours[name][0]}"
            for name in theirs
            if name in ours and theirs[name][1] != ours[name][1]
        ]
    both = " and ".join(count(len(sides[0][kind]), kind) for kind in sides[0])
    return Check("interface", not wrong, "; ".join(wrong) or f"the same: {both}")


def check_graph(base: Model, adapted: Model, manifest: Manifest) -> Check:
    """Without its slots the adapted model is the base, wherever these inputs may lead."""
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    if foreign := foreign_readers(adapted.proto, manifest.slots):
        return Check("graph", False, foreign[0])
    if manifest.unfused:
        plain = written_out_base(adapted)
        if changed := list(changed_parts(plain, base, manifest.unfused)):
            return Check("graph", False, changed[0])
    same = fingerprint(remove(adapted)) == fingerprint(base)
    what = "the base" if same else "another model"
    return Check("graph", same, f"without its slots it is {what}")


def check_checker(base: Model, adapted: Model, manifest: Manifest) -> Check:
    """The checker and strict shape inference say nothing new."""
    if manifest.inlined and base.proto.functions:
        base = inline_model(base)
    new = new_complaints(base, adapted, manifest.slots)
    return Check("checker", not new, "; ".join(new[:4]) or "nothing new to report")
