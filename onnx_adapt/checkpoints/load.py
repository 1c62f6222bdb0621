"""Load a trained checkpoint for one graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import Edit, LowRank, VirtualTokens
from onnx_adapt.checkpoints.mapping import Graph, Trained, find_graph, map_edits, read_trained
from onnx_adapt.checkpoints.modules.folded_calls import refuse_folded
from onnx_adapt.checkpoints.modules.selection import Selection
from onnx_adapt.checkpoints.placing.fused import fused_nodes
from onnx_adapt.checkpoints.placing.place import place
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.replacing import without_copies
from onnx_adapt.checkpoints.placing.sharing import share_weights
from onnx_adapt.checkpoints.placing.virtual_tokens import place_virtual_tokens
from onnx_adapt.checkpoints.readers.saved import Saved, name_damage
from onnx_adapt.graph.fused_draft import FusedPlace
from onnx_adapt.graph.names import reserved_names
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.graph.written_out import unfuse
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.model.given import ModelLike, as_model
from onnx_adapt.model.paths import as_path
from onnx_adapt.slot.manifest import Slot, read_manifest
from onnx_adapt.slot.places import owners
from onnx_adapt.slot.weights import stacks_of


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained adapter for one graph: the slots it needs, and the weights for them.

    Attributes:
        adapter: The weights.
        slots: The slots, as they are to be inserted.
        replacements: Weights of the base that the adapter replaces.
        unfused: Fused nodes of the graph that are to be written out first.
        base: Fingerprint of the graph it was placed in.
        losses: How far each slot is from what it stands for, relative to that, where it is
            an approximation.
        read: How many bytes the tensors of the checkpoint have; the adapter may need more.
    """

    adapter: Adapter
    slots: tuple[Slot, ...]
    replacements: tuple[ReplacementPlan, ...]
    base: str
    unfused: tuple[FusedPlace, ...] = ()
    losses: Mapping[str, float] = field(default_factory=dict)
    read: int = 0

    def __repr__(self) -> str:
        """The adapter, in the slots that it needs."""
        return f"<Checkpoint of {self.adapter!r}>"


def load_checkpoint(
    path: str | os.PathLike[str],
    model: ModelLike,
    *,
    name: str = "",
    base_weights: str | os.PathLike[str] | None = None,
    part: str = "",
    module_map: Mapping[str, str] | None = None,
    allow_missing: Sequence[str] = (),
) -> Checkpoint:
    """Read a trained adapter, as its library saved it, and find its modules in a model.

    Args:
        path: The folder that `save_pretrained` (PEFT) or `save_adapter` (AdapterHub) wrote,
            or a file or folder of another library.
        model: The base, exported without the adapter.
        name: The adapter's name; by default AdapterHub's, or that of the folder or file.
        base_weights: The base's `.safetensors` or `.bin`, for a graph that lost its names.
        part: Only the checkpoint's modules under this path are wanted, such as
            `"model.encoder"`, and the graph is that part of the model.
        module_map: Beginnings of the checkpoint's module paths and what to call them
            instead, such as `{"model.text": "language"}`; in whole words, before `part`.
        allow_missing: Globs of modules that the graph may lack; those that it lacks are left
            out, with a warning.

    Raises:
        CheckpointError: If the method is not supported, modules are not in the graph, or
            `part` or `module_map` fits no module, or `allow_missing` none that is missing.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> folder = "tests/cases/peft_bert_lora_default_ts/adapter"
        >>> len(oa.load_checkpoint(folder, base, name="fr").slots)
        4
    """
    path = as_path(path, "a checkpoint")
    model = as_model(model)
    trained = read_trained(path, Selection(part, module_map or {}, allow_missing))
    first = trained.edits[0]
    if isinstance(first, VirtualTokens):
        return _of_tokens(trained, model, first, name)
    graph = find_graph(model, base_weights, trained.edits)
    edits, names = map_edits(trained, graph)
    return place_edits(trained, graph, edits, names, name=name)


def _of_tokens(trained: Trained, model: Model, tokens: VirtualTokens, name: str) -> Checkpoint:
    """The adapter that is a decoder's first past, which needs no slots."""
    manifest = read_manifest(model.proto)
    identity = manifest.fingerprint if manifest else fingerprint(model)
    state = place_virtual_tokens(model, tokens)
    called = adapter_name(trained.saved, name)
    adapter = Adapter(called, {}, fingerprint=identity, initial_state=state)
    return Checkpoint(adapter, (), (), identity, read=tokens.rows.nbytes)


def place_edits(
    trained: Trained,
    graph: Graph,
    edits: Sequence[Edit],
    names: Mapping[str, str],
    *,
    name: str = "",
    full_names: bool = False,
) -> Checkpoint:
    """Place edits in a graph, as slots with weights.

    Args:
        trained: The checkpoint.
        graph: The graph.
        edits: What to place; only modules in `names`.
        names: The graph's path for each module.
        name: The adapter's name; by default the checkpoint's.
        full_names: Call slots after the checkpoint's paths, not the graph's.

    Raises:
        CheckpointError: If the graph has no place for one.
    """
    manifest = read_manifest(graph.model.proto)
    identity = manifest.fingerprint if manifest else fingerprint(graph.model)
    for module in dict.fromkeys(names[edit.module] for edit in edits):
        refuse_folded(graph.survey, graph.finder, module)
    fused = fused_nodes(graph.survey, graph.finder, names, edits)
    if fused:
        known = (manifest.slots, manifest.unfused) if manifest else ((), ())
        written, _ = unfuse(graph.model, fused, *known)
        graph = find_graph(written, graph.base_weights, trained.edits)
    taken = reserved_names(graph.survey.index)
    taken |= {slot.name for slot in manifest.slots} if manifest else set()
    placement = Placement(
        graph.model,
        graph.survey,
        graph.finder,
        names,
        taken,
        full_names=full_names,
        library=trained.saved.library,
    )
    for edit in without_copies(placement, edits):
        with name_damage(trained.saved, edit.module):
            place(placement, edit)
    share_weights(placement)
    adapter = Adapter(
        adapter_name(trained.saved, name),
        placement.weights,
        placement.replaced,
        {slot.name: slot.activation for slot in owners(placement.slots)},
        identity,
        stacks=stacks_of(placement.slots),
        invocation_tokens=_invocation(edits),
    )
    slots = tuple(placement.slots)
    read = sum(value.nbytes for value in trained.saved.tensors.values())
    plans = tuple(placement.plans)
    return Checkpoint(adapter, slots, plans, identity, tuple(fused), read=read)


def _invocation(edits: Sequence[Edit]) -> tuple[int, ...]:
    """The tokens from which on an aLoRA is on; all its modules have the same."""
    found = (edit.invocation for edit in edits if isinstance(edit, LowRank))
    return next(filter(None, found), ())


def adapter_name(saved: Saved, name: str) -> str:
    """The name of an adapter: as given, AdapterHub's, or the folder's or file's."""
    path = saved.path.resolve()
    own = path.name if path.is_dir() else path.stem
    return name or str(saved.config.get("name") or "") or own
