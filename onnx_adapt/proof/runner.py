"""A session of ONNX Runtime on a model whose weights stay in their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnx_adapt.errors import RunError
from onnx_adapt.model import external_data
from onnx_adapt.model.file import Model
from onnx_adapt.model.runtime_bytes import MAPPED, model_bytes
from onnx_adapt.ort import failures, onnxruntime, shortened

_NO_PREPACKING = "session.disable_prepacking"

_NO_QUANTISED_FUSION = "session.disable_quant_qdq"


Values = dict[str, Any]
"""Arrays by name; a sequence output is a list, a map output a dict."""


class Runner:
    """A model in ONNX Runtime on the CPU.

    Args:
        model: The model; nothing of it is copied but the graph.
        optimised: Whether ONNX Runtime may optimise the graph (its default level).
        shapes_first: Whether a Shape runs as soon as its tensor is there. In the order that
            ONNX Runtime has by default, a tensor waits in memory for its Shape.
        fuse_quantised: Whether that may make integer operators of quantised ones. Its pass
            for that breaks some models with more outputs than they had.

    Raises:
        RunError: If ONNX Runtime refuses the model.
        UnprovableError: If ONNX Runtime is not installed, or cannot be told where the
            weights are.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimised: bool,
        shapes_first: bool = False,
        fuse_quantised: bool = True,
    ) -> None:
        ort = onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        if shapes_first:
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        )
        if not fuse_quantised:
            options.add_session_config_entry(_NO_QUANTISED_FUSION, "1")
        self._label = model.label
        beside = (item.length or 0 for item in external_data.references(model.proto))
        if sum(place.length for place in model.payloads) + sum(beside) > MAPPED:
            options.add_session_config_entry(_NO_PREPACKING, "1")
        data = model_bytes(model, options)
        known = failures()
        self._failures = known
        try:
            self._session = ort.InferenceSession(
                data, options, providers=["CPUExecutionProvider"]
            )
        except known as error:
            raise RunError(
                f"ONNX Runtime {ort.__version__} cannot load {model.label}: "
                f"{shortened(error)}",
                hint="`onnx-adapt check` says whether its slots are whole; a base may need "
                "operators or providers that are not here",
            ) from error
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> Values:
        """Run the model once.

        Raises:
            RunError: If ONNX Runtime refuses the inputs or fails.
        """
        names = list(self.outputs if outputs is None else outputs)
        try:
            values = self._session.run(names, dict(feeds))
        except self._failures as error:
            wanted = ", ".join(f"{i.name} {i.shape}" for i in self._session.get_inputs())
            raise RunError(
                f"{self._label} does not run: {shortened(error)}",
                hint=f"do the inputs fit? The model asks for {shortened(wanted)}",
            ) from error
        return dict(zip(names, values, strict=True))


def as_arrays(value: Any) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """The arrays inside an output: itself, the items of a sequence, the values of a map."""
    if isinstance(value, list):
        return [array for item in value for array in as_arrays(item)]
    if isinstance(value, dict):
        return [array for key in sorted(value) for array in as_arrays(value[key])]
    return [np.asarray(value)]
