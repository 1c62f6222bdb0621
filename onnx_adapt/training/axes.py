"""How many axes tensors have that shape inference says nothing of, from one run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper

from onnx_adapt.edit.remove import remove
from onnx_adapt.errors import AdaptError
from onnx_adapt.graph.gradients.types import without_axes
from onnx_adapt.graph.index import index_model
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU
from onnx_adapt.proof.inputs import inputs_for
from onnx_adapt.proof.runner import Runner


def find_axes(
    model: Model, forward: Model, outputs: Sequence[str], weights: Sequence[str]
) -> dict[str, int]:
    """Find how many axes tensors between weights and outputs have.

    Only where shape inference does not know it is the model run, once, with made-up inputs.

    Args:
        model: The adapted model.
        forward: The same model as its gradients are taken of.
        outputs: The outputs that the loss is on.
        weights: The inputs that train.

    Returns:
        The numbers of axes by tensor. It is empty if the model does not run here, and a rule
        that needs one says so.
    """
    index = index_model(forward)
    names = without_axes(index, outputs, weights)
    if not names:
        return {}
    tapped = forward.copy()
    there = {value.name for value in tapped.proto.graph.output}
    tapped.proto.graph.output.extend(
        helper.make_tensor_value_info(name, kind, None)
        for name in names
        if (kind := index.main.type_of(name).elem_type) and name not in there
    )
    try:
        feeds = inputs_for(remove(model))[0]
        values = Runner(tapped, CPU, optimised=False).run(feeds, names)
    except AdaptError:
        return {}
    return {name: np.ndim(value) for name, value in values.items()}
