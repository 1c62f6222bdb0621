"""Projections that onnxruntime-genai's builder packed into one MatMul.

An example: a model of width 64 with 4 heads for queries, 2 for keys and 2 for values, of 16
numbers each. Its `qkv_proj` is one MatMul with 64 + 32 + 32 = 128 columns, which a
GroupQueryAttention with `num_heads=4` and `kv_num_heads=2` reads. So 128 columns over
4 + 2 + 2 heads are 16 a head: `q_proj` has the columns 0 to 64, `k_proj` 64 to 96 and `v_proj`
96 to 128. LoRA on `v_proj` becomes a slot on all 128 columns whose `up` is zero in the first
96.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import onnx

from onnx_adapt.checkpoints.modules.calls import LayerCall, call_at
from onnx_adapt.graph.index import attribute
from onnx_adapt.graph.layers import is_module_call, weight_width
from onnx_adapt.graph.sites import Survey

_PACKED = "qkv_proj"


def packed_calls(survey: Survey) -> dict[str, list[LayerCall]]:
    """Find the `q_proj`, `k_proj` and `v_proj` inside each `qkv_proj`, by module path.

    How many columns belong to each follows from the heads of the attention that reads them.
    """
    found: dict[str, list[LayerCall]] = {}
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
            call = call_at(survey, view, node)
            attention = attentions.get(call.output)
            width = weight_width(view, node)
            if attention is None or width is None:
                continue
            for name, span in zip("qkv", _spans(attention, width), strict=False):
                found.setdefault(f"{around}.{name}_proj", []).append(replace(call, span=span))
    return found


def _spans(attention: onnx.NodeProto, width: int) -> list[tuple[int, int]]:
    queries = attribute(attention, "num_heads", 0)
    keys = attribute(attention, "kv_num_heads", 0)
    heads = (queries, keys, keys)
    if min(heads) < 1 or width % sum(heads):
        return []
    size = width // sum(heads)
    return list(pairwise(accumulate((n * size for n in heads), initial=0)))
