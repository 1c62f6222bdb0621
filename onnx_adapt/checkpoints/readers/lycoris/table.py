"""The table of LyCORIS's methods.

The formulas are those of LyCORIS 4.1 (https://github.com/KohakuBlueleaf/LyCORIS), which wrote
most of these files. `alpha / rank` scales all but the rotations and full differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.lycoris.low_rank import loha_edits, lokr_edits, lora_edits
from onnx_adapt.checkpoints.readers.lycoris.weights import (
    full_edits,
    glora_edits,
    ia3_edits,
    norm_edits,
    oft_edits,
    set_edits,
)
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Method:
    """How one kind of tensors is read.

    Attributes:
        label: What the method is called.
        marks: A module with one of these tensors is of this method.
        others: The names of its other tensors.
        edits: What the tensors of one module ask for.
    """

    label: str
    marks: tuple[str, ...]
    others: tuple[str, ...]
    edits: Callable[[ModuleTensors], Iterator[Edit]]


def module_edits(found: ModuleTensors) -> Iterator[Edit]:
    """What the tensors of one module ask for.

    Raises:
        CheckpointError: If they are of no known method, of two, or incomplete.
    """
    names = found.parts.keys()
    method = next((m for m in METHODS if names & set(m.marks)), None)
    if "reshape_weight" in names:
        raise CheckpointError(
            f"module {found.module!r} has reshape_weight: the adapter is for a base whose "
            "layer was made larger first",
            hint="export the model with the enlarged layer, and take reshape_weight out",
        )
    if method is None:
        raise CheckpointError(
            f"module {found.module!r} has {', '.join(names)}, which is of no known method",
            hint=f"{', '.join(m.label for m in METHODS)} are read",
        )
    if other := names - {*method.marks, *method.others}:
        raise CheckpointError(
            f"module {found.module!r} is of {method.label}, and has {', '.join(other)} as "
            "well, which is of another method"
        )
    yield from method.edits(found)


METHODS = (
    Method(
        "LoRA",
        ("lora_down", "lora_up"),
        ("lora_mid", "lora_up.bias", "alpha", "dora_scale", "diff_b"),
        lora_edits,
    ),
    Method(
        "LoHa",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
        ("hada_t1", "hada_t2", "alpha", "dora_scale"),
        loha_edits,
    ),
    Method(
        "LoKr",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_t2", "alpha", "dora_scale"),
        lokr_edits,
    ),
    Method("OFT", ("oft_blocks",), ("rescale", "alpha"), oft_edits),
    Method("GLoRA", ("a1", "a2", "b1", "b2"), ("alpha",), glora_edits),
    Method("IA3", ("on_input",), ("weight",), ia3_edits),
    Method("a trained normalisation", ("w_norm", "b_norm"), (), norm_edits),
    Method("a replaced weight", ("set_weight",), (), set_edits),
    Method("a full difference", ("diff", "diff_b"), (), full_edits),
)
"""The methods; the first that a module has a mark of is its method."""
