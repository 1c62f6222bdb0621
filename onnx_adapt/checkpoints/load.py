"""Load a trained checkpoint of PEFT or AdapterHub for one graph."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnx_adapt.adapter.data import Adapter
from onnx_adapt.checkpoints.edits import Edit, Replacement
from onnx_adapt.checkpoints.modules.by_name import ByName
from onnx_adapt.checkpoints.modules.by_value import ByValue, find_by_value
from onnx_adapt.checkpoints.modules.model_parts import parts_shown
from onnx_adapt.checkpoints.modules.names import (
    map_modules,
    refuse_other_part,
    refuse_unmapped,
)
from onnx_adapt.checkpoints.modules.packed import packed_layers, unpack, unpacked
from onnx_adapt.checkpoints.placing.place import place
from onnx_adapt.checkpoints.placing.placement import Placement
from onnx_adapt.checkpoints.placing.replacing import plan_replacement
from onnx_adapt.checkpoints.placing.sharing import share_weights
from onnx_adapt.checkpoints.readers.folder import Folder, name_damage, read_state_dict
from onnx_adapt.checkpoints.readers.table import read_edits, read_folder
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError
from onnx_adapt.graph.names import reserved_names
from onnx_adapt.graph.replaceable import ReplacementPlan
from onnx_adapt.graph.sites import survey_model
from onnx_adapt.model.file import Model
from onnx_adapt.model.fingerprint import fingerprint
from onnx_adapt.slot.manifest import Manifest, Slot, read_manifest
from onnx_adapt.slot.places import owners

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained adapter for one graph: the slots it needs, and the weights for them.

    Attributes:
        adapter: The weights.
        slots: The slots, as they are to be inserted.
        replacements: Weights of the base that the adapter replaces.
        base: Fingerprint of the graph it was placed in.
    """

    adapter: Adapter
    slots: tuple[Slot, ...]
    replacements: tuple[ReplacementPlan, ...]
    base: str


def load_checkpoint(
    path: str | os.PathLike[str],
    model: Model,
    *,
    name: str = "",
    base_weights: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Read a checkpoint folder of PEFT or AdapterHub and find its modules in a model.

    Args:
        path: The folder that `save_pretrained` or `save_adapter` wrote.
        model: The base, exported without the adapter.
        name: The adapter's name; by default AdapterHub's, or the folder's.
        base_weights: The base's `.safetensors` or `.bin`, for a graph that lost its names.

    Raises:
        CheckpointError: If the method is not supported, or modules are not in the graph.

    Example:
        >>> import onnx_adapt as oa
        >>> base = oa.open_model("tests/cases/peft_bert_lora_default_ts/base.onnx")
        >>> folder = "tests/cases/peft_bert_lora_default_ts/adapter"
        >>> len(oa.load_checkpoint(folder, base, name="fr").slots)
        4
    """
    folder = read_folder(Path(path))
    edits = read_edits(folder)
    survey = survey_model(model)
    finder: ByName | ByValue = ByName(survey, packed_layers(survey))
    if base_weights is not None:
        file = Path(base_weights)
        finder = find_by_value(model, survey, read_state_dict(file), file.name)
    edits, names = _map(folder, edits, finder, parts_shown(model.proto, survey.modules.paths))
    manifest = read_manifest(model.proto)
    taken = reserved_names(survey.index)
    taken |= {slot.name for slot in manifest.slots} if manifest else set()
    placement = Placement(model, survey, finder, names, taken)
    replaced: dict[str, Array] = {}
    plans: list[ReplacementPlan] = []
    for edit in edits:
        with name_damage(folder, edit.module):
            if isinstance(edit, Replacement):
                _replace(placement, edit, plans, replaced)
                _refuse_replaced(plans[-1], manifest)
            else:
                place(placement, edit)
    share_weights(placement)
    identity = manifest.fingerprint if manifest else fingerprint(model)
    adapter = Adapter(
        name or str(folder.config.get("name") or "") or folder.path.resolve().name,
        placement.weights,
        replaced,
        {slot.name: slot.activation for slot in owners(placement.slots)},
        identity,
    )
    return Checkpoint(adapter, tuple(placement.slots), tuple(plans), identity)


def _refuse_replaced(plan: ReplacementPlan, manifest: Manifest | None) -> None:
    """Refuse to replace a weight that an earlier insertion replaces already."""
    if manifest and plan.weight.original in {weight.name for weight in manifest.weights}:
        raise CheckpointError(
            f"{plan.weight.original!r} of the model is replaced by an adapter already",
            hint="`onnx-adapt convert` gives another adapter for the same slots; else insert "
            "into the base model",
        )


def _replace(
    placement: Placement,
    edit: Replacement,
    plans: list[ReplacementPlan],
    replaced: dict[str, Array],
) -> None:
    """Plan to replace a weight, once; a head's bias can have two names in a checkpoint."""
    plan, value = plan_replacement(placement, edit)
    twin = next((other for other in plans if {*other.readers} & {*plan.readers}), None)
    if twin is None:
        plans.append(plan)
        replaced[plan.weight.name] = value
    elif not np.array_equal(value, replaced[twin.weight.name]):
        raise CheckpointError(
            f"{plan.weight.name!r} and {twin.weight.name!r} are one weight of the graph, "
            "and the checkpoint has two values for it"
        )


def _map(
    folder: Folder, edits: list[Edit], finder: ByName | ByValue, shown: Collection[str]
) -> tuple[list[Edit], Mapping[str, str]]:
    """Map the modules of all edits; a head that the graph does not have is left out."""
    known = finder.known()
    parts = {edit.module: unpacked(edit.module, known) for edit in edits}
    wanted = list(dict.fromkeys(part for edit in edits for part in parts[edit.module]))
    head = {key.rpartition(".")[0] for key in folder.head}
    kind = str(folder.config.get("model_type", ""))
    names = map_modules(wanted, known, optional=head, kind=kind, shown=shown)
    if not set(wanted) <= names.keys() and (stored := finder.stored()):
        known = [*known, *stored]
        names = map_modules(wanted, known, optional=head, kind=kind, shown=shown)
    left_out = sorted(head - set(names))
    if isinstance(finder, ByValue):
        left_out = sorted(head) if finder.lacks_head(folder.head, names) else []
    if left_out and any(module in names for module in wanted if module not in head):
        _log.warning(
            "left out the head saved beside the adapter: the graph has no %s",
            ", ".join(left_out),
        )
        edits = [edit for edit in edits if edit.module not in left_out]
        wanted = [module for module in wanted if module not in left_out]
    label = finder.label if isinstance(finder, ByValue) else ""
    refuse_other_part(wanted, names, known, kind=kind, shown=shown, file=label)
    refuse_unmapped(wanted, names, known, label)
    if not edits:
        raise CheckpointError(f"{folder.path} asks for nothing")
    return [piece for edit in edits for piece in _apart(edit, parts, names, finder)], names


def _apart(
    edit: Edit,
    parts: Mapping[str, tuple[str, ...]],
    names: Mapping[str, str],
    finder: ByName | ByValue,
) -> Iterator[Edit]:
    """Cut an edit into those of the modules that the graph has in place of a packed one."""
    if parts[edit.module] == (edit.module,):
        yield edit
        return
    calls = {module: finder.calls(names[module]) for module in parts[edit.module]}
    for module, found in calls.items():
        if not found:
            raise finder.missing(names[module])
    yield from unpack(edit, {module: found[0].sizes[1] for module, found in calls.items()})
