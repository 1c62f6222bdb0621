"""A session of ONNX Runtime with the settings that training takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import helper

from onnx_adapt.dtypes import Array
from onnx_adapt.model.file import Model
from onnx_adapt.model.runtime_bytes import keep_unpacked, model_bytes
from onnx_adapt.ort import (
    Providers,
    onnxruntime,
    run_session,
    start_exactly,
    start_session,
    threads,
)


class TrainingSession:
    """A model, or a part of one, in ONNX Runtime.

    Args:
        model: The model.
        providers: Where to run it.

    Raises:
        RunError: If ONNX Runtime refuses the model.
    """

    def __init__(self, model: Model, providers: Providers) -> None:
        ort = onnxruntime()

        def start(options: Any) -> Any:
            options.log_severity_level = 4
            # A step of MiniLM takes 379 MB so, and 520 MB by default, in the same time:
            # without a Shape node keeping its tensor until late, and without one block for
            # all tensors.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.enable_mem_pattern = False
            options.intra_op_num_threads = threads()
            keep_unpacked(model, options)  # BERT base: 763 MB, 1079 MB packed; 3 % slower
            return start_session(
                model_bytes(model, options),
                options,
                providers,
                label=model.label,
                hint="`onnx-adapt verify` says whether the adapted model runs",
            )

        self._label = model.label
        self._wanted_only = ort.RunOptions()
        self._wanted_only.only_execute_path_to_fetches = True
        self._session, _ = start_exactly(start)
        self._dtypes = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in model.proto.graph.input
        }

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], on: str
    ) -> dict[str, Array]:
        """Compute some outputs, and nothing that they do not need.

        Args:
            feeds: The inputs; they are given the types that the model takes.
            outputs: The outputs.
            on: What the inputs are, for messages.

        Raises:
            RunError: If ONNX Runtime refuses the inputs or fails.
        """
        typed = {
            name: np.asarray(value, self._dtypes.get(name, value.dtype))
            for name, value in feeds.items()
        }
        label = f"{self._label} on {on}"
        values = run_session(
            self._session, outputs, typed, label=label, run_options=self._wanted_only
        )
        return dict(zip(outputs, values, strict=True))
