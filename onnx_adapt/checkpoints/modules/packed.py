"""Projections that onnxruntime-genai's builder packed into one MatMul."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import onnx

from onnx_adapt.checkpoints.modules.cores import Core, core_at
from onnx_adapt.graph.index import attribute
from onnx_adapt.graph.layers import is_module_call, weight_width
from onnx_adapt.graph.sites import Survey

_PACKED = "qkv_proj"


def packed_cores(survey: Survey) -> dict[str, list[Core]]:
    """The `q_proj`, `k_proj` and `v_proj` inside each `qkv_proj`, by module path.

    How many columns belong to each follows from the heads of the attention that reads them.
    """
    found: dict[str, list[Core]] = {}
    for path, view in survey.index.views.items():
        attentions = {
            node.input[0]: node
            for node in view.nodes
            if node.op_type == "GroupQueryAttention" and not any(node.input[1:3])
        }
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            around, _, leaf = (scope or "").rpartition(".")
            if leaf != _PACKED or not is_module_call(view, node):
                continue
            core = core_at(survey, view, node)
            attention = attentions.get(core.output)
            width = weight_width(view, node)
            if attention is None or width is None:
                continue
            for name, span in zip("qkv", _spans(attention, width), strict=False):
                found.setdefault(f"{around}.{name}_proj", []).append(replace(core, span=span))
    return found


def _spans(attention: onnx.NodeProto, width: int) -> list[tuple[int, int]]:
    queries = attribute(attention, "num_heads", 0)
    keys = attribute(attention, "kv_num_heads", 0)
    heads = (queries, keys, keys)
    if min(heads) < 1 or width % sum(heads):
        return []
    size = width // sum(heads)
    return list(pairwise(accumulate((n * size for n in heads), initial=0)))
