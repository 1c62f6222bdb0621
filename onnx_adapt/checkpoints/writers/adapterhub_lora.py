"""Write LoRA, DoRA and IA3 with AdapterHub's keys and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_adapt.checkpoints.edits import Edit, LowRank, Scaling, SlotEdit
from onnx_adapt.checkpoints.writers.adapterhub_models import ModelKind
from onnx_adapt.checkpoints.writers.wanted import padded_rank, refuse
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

Tensors = dict[str, Array]


def write_lora(
    items: Sequence[SlotEdit], kind: ModelKind, name: str
) -> tuple[Tensors, dict[str, Any], int]:
    """Write the LoRA, DoRA or IA3 of one adapter.

    Args:
        items: The slots.
        kind: The model.
        name: The adapter's name.

    Returns:
        The tensors, the settings, and the width of the model.

    Raises:
        CheckpointError: If the library has none on one of the modules.
    """
    keys = {item.edit.module: _key(item, kind) for item in items}
    form = _common_form(items)
    scaled = form == "IA3"
    fused = [item.edit for item in items if keys[item.edit.module] == "qkv"]
    on = _enabled(fused)
    ranks = [_rank(item.edit, on if keys[item.edit.module] == "qkv" else "") for item in items]
    rank = max(ranks)
    letters = sorted(
        {*on, *(key for key in keys.values() if key in _LETTERS)}, key="qkv".index
    )
    there = {kind.layer(module) for module in keys}
    if form == "DoRA":
        _refuse_gaps(items[0], keys, kind)
    config = {
        "architecture": "lora",
        "alpha": rank,
        "attn_matrices": letters,
        "composition_mode": "scale" if scaled else "add",
        "dropout": 0.0,
        "init_weights": "ia3" if scaled else "lora",
        "intermediate_lora": "intermediate" in keys.values(),
        "leave_out": [i for i in range(kind.layers) if i not in there],
        "output_lora": "output" in keys.values(),
        "r": rank,
        "selfattn_lora": bool(letters),
        "use_dora": form == "DoRA",
        "use_gating": form == "LoRA with a gate",
    }
    tensors: Tensors = {}
    for item in items:
        prefix = f"{item.edit.module}.loras.{name}."
        edit = _grouped(item.edit, on) if keys[item.edit.module] == "qkv" else item.edit
        tensors |= {prefix + key: value for key, value in _tensors(edit, rank)}
    return tensors, config, _width(items)


_LETTERS = ("q", "k", "v")

# LoRA on a module that computes q, k and v together has one A and one B for each of them that
# is switched on. For example rank 4 on q and v of a c_attn of 3 * 32 outputs is
#
#     lora_A (8, in)     the four rows of q, then those of v
#     lora_B (64, 4)     the rows of q, then those of v
#
# and in a slot `b` is (96, 8), zero but for two blocks. A slot that mixes them, such as
# PEFT's, is written with all three switched on and the same A for each.


def _enabled(fused: Sequence[Edit]) -> str:
    """Which of q, k and v the modules that compute all three need, as letters."""
    on = ""
    for letter, third in zip(_LETTERS, range(3), strict=True):
        if any(_differs(edit, third) for edit in fused):
            on += letter
    scales = all(isinstance(edit, Scaling) for edit in fused)
    return on if scales or all(_is_blocks(edit, on) for edit in fused) else "qkv"


def _differs(edit: Edit, third: int) -> bool:
    if isinstance(edit, LowRank):
        return bool(np.any(np.split(edit.b, 3)[third]))
    assert isinstance(edit, Scaling)
    return bool(np.any(np.split(edit.vector, 3)[third] != 1))


def _is_blocks(edit: Edit, on: str) -> bool:
    """Whether each of the thirds that are on has rows of A to itself."""
    assert isinstance(edit, LowRank)
    if edit.magnitude is not None or not on or len(edit.a) % len(on):
        return False
    blocks = _blocks(edit, on)
    return sum(map(np.count_nonzero, blocks)) == np.count_nonzero(edit.b)


def _blocks(edit: LowRank, on: str) -> list[Array]:
    thirds = [np.split(edit.b, 3)[_LETTERS.index(letter)] for letter in on]
    rank = len(edit.a) // len(on)
    return [third[:, i * rank : (i + 1) * rank] for i, third in enumerate(thirds)]


def _grouped(edit: Edit, on: str) -> Edit:
    """The edit of a module that computes q, k and v, in the library's layout."""
    if isinstance(edit, Scaling):
        thirds = zip(np.split(edit.vector, 3), _LETTERS, strict=True)
        return replace(
            edit, vector=np.concatenate([t for t, letter in thirds if letter in on])
        )
    assert isinstance(edit, LowRank)
    if _is_blocks(edit, on):
        return replace(edit, b=np.concatenate(_blocks(edit, on)))
    return replace(edit, a=np.tile(edit.a, (3, 1)))


def _key(item: SlotEdit, kind: ModelKind) -> str:
    key = kind.lora_key(item.edit.module)
    if not key or kind.layer(item.edit.module) is None:
        reason = f"AdapterHub has none on {item.edit.module!r} of a {kind.name}"
        raise refuse(item, reason, "--to peft writes it")
    return key


def _common_form(items: Sequence[SlotEdit]) -> str:
    """The method that all slots of an adapter have.

    Raises:
        CheckpointError: If two have others.
    """
    form = _form(items[0])
    for item in items[1:]:
        if _form(item) != form:
            raise CheckpointError(
                f"slot {items[0].slot!r} is {form} and slot {item.slot!r} is {_form(item)}; "
                "an adapter of AdapterHub is one of them in all its modules",
                hint="train them as two adapters, and stack these",
            )
    return form


def _form(item: SlotEdit) -> str:
    """What the library calls the method of one slot.

    Raises:
        CheckpointError: If the library's has less than it.
    """
    edit = item.edit
    if isinstance(edit, Scaling):
        if edit.on_input:
            raise refuse(item, "it scales the input, and AdapterHub's IA3 the output",
                         "--to peft writes it")  # fmt: skip
        return "IA3"
    assert isinstance(edit, LowRank)
    if edit.bias is not None:
        raise refuse(item, "it has a bias, which AdapterHub's LoRA does not",
                     "--to peft writes it")  # fmt: skip
    if edit.gate is not None:
        return "LoRA with a gate"
    if edit.magnitude is None:
        return "LoRA"
    if item.biased and not edit.scales_bias:
        raise refuse(
            item,
            "its scale does not cover the bias of the layer, as AdapterHub's DoRA does",
            "--to peft writes it",
        )
    return "DoRA"


def _refuse_gaps(item: SlotEdit, keys: dict[str, str], kind: ModelKind) -> None:
    """Refuse DoRA that lacks a module which the settings switch on in every layer."""
    there = {(kind.layer(module), key) for module, key in keys.items()}
    layers, names = {layer for layer, _ in there}, {key for _, key in there}
    missing = [(i, key) for i in layers for key in names if (i, key) not in there]
    if missing:
        layer, key = missing[0]
        raise refuse(
            item,
            f"layer {layer} has none on {key}, which other layers have; AdapterHub has it in "
            "all layers or none",
        )


def _rank(edit: Edit, on: str) -> int:
    """The rank of a module; of one that computes q, k and v, that of each of them."""
    if isinstance(edit, Scaling):
        return 1
    assert isinstance(edit, LowRank)
    return len(edit.a) // len(on) if on and _is_blocks(edit, on) else len(edit.a)


def _tensors(edit: Edit, rank: int) -> Iterator[tuple[str, Array]]:
    if isinstance(edit, Scaling):
        yield "lora_B", edit.vector.reshape(-1, 1)
        return
    assert isinstance(edit, LowRank)
    groups = [replace(edit, a=a) for a in np.split(edit.a, len(edit.a) // edit.b.shape[1])]
    both = [padded_rank(group, rank) for group in groups]
    yield "lora_A", np.concatenate([a for a, _ in both])
    yield "lora_B", both[0][1]
    if edit.magnitude is not None:
        yield "m.weight", edit.magnitude.reshape(-1, 1)
    if edit.gate is not None:
        yield "gate.weight", edit.gate[0]
        yield "gate.bias", edit.gate[1]


def _width(items: Sequence[SlotEdit]) -> int:
    """The width of the model, as far as the layers tell: the smaller side of the first."""
    edit = items[0].edit
    if isinstance(edit, LowRank):
        return min(int(edit.a.shape[1]), len(edit.b))
    assert isinstance(edit, Scaling)
    return int(edit.vector.shape[0])
