"""Modules that one node computes side by side, and checkpoints in which they are one module.

An example: onnxruntime-genai's builder writes a model of width 64 with 4 heads for queries, 2
for keys and 2 for values, of 16 numbers each, with one MatMul `qkv_proj` of 64 + 32 + 32 = 128
columns. What reads it tells whose columns they are: a GroupQueryAttention with `num_heads=4`
and `kv_num_heads=2`, or a Split into 64, 32 and 32. So `q_proj` has the columns 0 to 64,
`k_proj` 64 to 96 and `v_proj` 96 to 128. LoRA on `v_proj` becomes a slot on all 128 columns
whose `up` is zero in the first 96.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Replacement, Reweight, Scaling
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.column_spans import column_spans, spans_of
from onnx_adapt.graph.layer_calls import LayerCall, Packing
from onnx_adapt.graph.layers import find_weight, is_module_call
from onnx_adapt.graph.sites import Survey

_PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q", "k", "v"),
    "Wqkv": ("Wq", "Wk", "Wv"),
    "query_key_value": ("query", "key", "value"),
    "to_qkv": ("to_q", "to_k", "to_v"),
    "add_qkv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "kv_proj": ("k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Names of modules whose columns are those of others, one after the other, and their names."""


_INTERLEAVED = ("query_key_value",)
"""Names of packed modules whose rows some models order by heads."""


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer that computes several modules side by side.

    Attributes:
        path: The layer's own module path.
        call: Its call.
        modules: The paths of the modules inside, in the order of their columns.
    """

    path: str
    call: LayerCall
    modules: tuple[str, ...]

    def part(self, module: str) -> LayerCall:
        """The call of one of the modules.

        Raises:
            CheckpointError: If what reads the layer does not cut it into these modules.
        """
        spans, width = column_spans(self.call), self.call.sizes[1]
        if len(spans) != len(self.modules) or spans[-1][1] != width:
            cut = ", ".join(f"{start} to {end}" for start, end in spans)
            raise CheckpointError(
                f"{self.path!r} has {width} columns for {', '.join(self.modules)}; what reads "
                f"it takes the columns {cut}, which is not the same",
                hint="build the model with separate projections (--extra_options "
                "fuse_qkv=false), or insert into the model as exported",
            )
        packing = Packing(self.path, self.modules, (0, *(end for _, end in spans)))
        return replace(self.call, span=packing.span(module), packing=packing)


def packed_layers(survey: Survey) -> dict[str, list[PackedLayer]]:
    """Find the layers that compute several modules side by side, by the paths of the modules.

    A layer counts as one if its name or that of its weight says so, and its readers cut its
    columns.
    """
    found: dict[str, list[PackedLayer]] = {}
    for path, view in survey.index.views.items():
        for scope, node in zip(survey.modules.scopes[path], view.nodes, strict=True):
            call = survey.call(view, node) if is_module_call(view, node) else None
            if call is None:
                continue
            layer = _by_module(scope or "", call) or _by_weight(call)
            if layer is not None and column_spans(call):
                for module in layer.modules:
                    found.setdefault(module, []).append(layer)
    return found


def _by_module(path: str, call: LayerCall) -> PackedLayer | None:
    """The layer of a module whose name says that it is several."""
    around, dot, leaf = path.rpartition(".")
    modules = tuple(f"{around}{dot}{name}" for name in _PACKED.get(leaf, ()))
    return PackedLayer(path, call, modules) if modules else None


_CONCATENATED = re.compile(r"(?P<names>.+\.weight(__.+\.weight)+)__axis_0__concat(_t)?")


def _by_weight(call: LayerCall) -> PackedLayer | None:
    """The layer whose weight onnx-ir's optimiser concatenated from those of several.

    It calls it after them: `attn.q_proj.weight__attn.k_proj.weight__axis_0__concat_t`.
    """
    weight = find_weight(call.view, call.weight)
    match = _CONCATENATED.fullmatch(weight.tensor.name) if weight else None
    if match is None:
        return None
    modules = tuple(n.removesuffix(".weight") for n in match["names"].split("__"))
    around, dot, _ = modules[0].rpartition(".")
    leaves = tuple(module.rpartition(".")[2] for module in modules)
    names = {parts: name for name, parts in _PACKED.items()}
    return PackedLayer(f"{around}{dot}{names.get(leaves, '+'.join(leaves))}", call, modules)


def unpacked(module: str, known: Collection[str]) -> tuple[str, ...]:
    """The modules that stand for one of a checkpoint in a graph that has them apart.

    Args:
        module: A module of the checkpoint, such as `layers.0.mlp.gate_up_proj`.
        known: The modules of the graph.

    Returns:
        The module itself, or those beside each other that the graph has instead of it.
    """
    around, dot, leaf = module.rpartition(".")
    leaves = {path.rpartition(".")[2] for path in known}
    names = _PACKED.get(leaf, ())
    apart = {name.rpartition(".")[2] for name in names}
    if leaf in leaves or not names or not leaves >= apart:
        return (module,)
    return tuple(f"{around}{dot}{name}" for name in names)


def packed_names(known: Collection[str]) -> Iterator[str]:
    """The paths that packed modules would have where a graph has those inside them."""
    there = set(known)
    for leaf, names in _PACKED.items():
        for path in known:
            around = path.removesuffix(names[0])
            if (
                path != around
                and around[-1:] in (".", "")
                and {f"{around}{name}" for name in names} <= there
            ):
                yield f"{around}{leaf}"


def unpack(edit: Edit, sizes: Mapping[str, int]) -> Iterator[Edit]:
    """Cut an edit of a packed module into edits of the modules that a graph has instead.

    All of them read what the packed module reads, so A is theirs too; each has its own rows
    of B, and of whatever else has a number for each output.

    Args:
        edit: The edit.
        sizes: The outputs of each of the modules in the graph.

    Raises:
        CheckpointError: If they are not as many as the edit is for.
    """
    total = sum(sizes.values())
    if edit.module.rpartition(".")[2] in _INTERLEAVED:
        raise CheckpointError(
            f"{edit.module!r} of the checkpoint is {len(sizes)} modules in the graph; rows "
            "may go through the heads (GPT-NeoX, BLOOM, Falcon) or through the modules "
            "(ChatGLM), and the file does not tell which",
            hint="export the base with this module in one piece",
        )
    for module, (start, end) in zip(sizes, spans_of(list(sizes.values())), strict=True):
        match edit:
            case LowRank() if edit.b.shape[0] == total and edit.gate is None:
                yield replace(
                    edit,
                    module=module,
                    b=edit.b[start:end],
                    bias=None if edit.bias is None else edit.bias[start:end],
                    magnitude=None if edit.magnitude is None else edit.magnitude[start:end],
                )
            case Scaling(on_input=True):
                yield replace(edit, module=module)
            case Scaling() if edit.vector.size == total:
                yield replace(edit, module=module, vector=np.ravel(edit.vector)[start:end])
            case Replacement() if edit.value.shape[0] == total:
                yield replace(edit, module=module, value=edit.value[start:end])
            case Reweight():
                raise CheckpointError(
                    f"{edit.module!r} of the checkpoint has a method that computes the whole "
                    f"weight at once; the graph has {', '.join(sizes)} instead of that layer",
                    hint="give the adapter with the names of these layers, as diffusers or "
                    "transformers calls them",
                )
            case _:
                raise CheckpointError(
                    f"{edit.module!r} of the checkpoint does not fit the layers that the "
                    f"graph has instead of it: {', '.join(sizes)}, with {total} outputs",
                    hint="is it an adapter for another size of this model?",
                )
