"""A session of ONNX Runtime on a model whose weights stay in their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnx_adapt.model.file import Model
from onnx_adapt.model.runtime_bytes import keep_unpacked, model_bytes
from onnx_adapt.ort import (
    ProviderChoice,
    Providers,
    onnxruntime,
    read_providers,
    run_session,
    start_exactly,
    start_session,
)
from onnx_adapt.session.loaded_model import base_values
from onnx_adapt.slot.manifest import read_manifest
from onnx_adapt.slot.required import required_feeds

_NO_QUANTISED_FUSION = "session.disable_quant_qdq"

_EXACT = {"CUDAExecutionProvider": ("use_tf32", "0")}
"""The option that makes a provider compute in the type of its tensors.

TF32 keeps 10 of the 23 bits of a float32. The bounds of the proof assume all of them.
"""

Values = dict[str, Any]
"""Arrays by name; a sequence output is a list, a map output a dict."""

ProviderArgument = ProviderChoice | Sequence[ProviderChoice] | None
"""The `provider` argument of a proof; None is the CPU."""


def proof_providers(given: ProviderArgument) -> Providers:
    """The execution providers for a proof; CUDA computes without TF32 unless told otherwise.

    Raises:
        RunError: If this build of ONNX Runtime does not have one of them.
    """
    return in_full_precision(read_providers(given))


def in_full_precision(providers: Providers) -> Providers:
    """The providers with TF32 turned off where no option decides about it."""
    return tuple(
        replace(provider, options=(*provider.options, exact))
        if (exact := _EXACT.get(provider.name)) and exact[0] not in dict(provider.options)
        else provider
        for provider in providers
    )


class Runner:
    """A model in ONNX Runtime.

    Args:
        model: The model; only its graph is copied, never its weights.
        providers: Where to run it.
        optimised: Whether ONNX Runtime may optimise the graph (its default level).
        shapes_first: Run a Shape node as soon as its tensor is there. In the default order
            of ONNX Runtime a tensor stays in memory until its Shape node has run.
        fuse_quantised: Whether ONNX Runtime may replace quantised operators by integer
            ones. This pass breaks some models to which outputs were added.
        exact: Whether sums of 8-bit products must not saturate on any processor.

    Raises:
        RunError: If ONNX Runtime refuses the model or a provider does not start.
        UnprovableError: If ONNX Runtime is not installed, or cannot be told where the
            weights are.
    """

    def __init__(
        self,
        model: Model,
        providers: Providers,
        *,
        optimised: bool,
        shapes_first: bool = False,
        fuse_quantised: bool = True,
        exact: bool = True,
    ) -> None:
        ort = onnxruntime()
        levels = ort.GraphOptimizationLevel

        def start(options: Any) -> Any:
            options.log_severity_level = 4
            if shapes_first:
                options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
            options.graph_optimization_level = (
                levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
            )
            if not fuse_quantised:
                options.add_session_config_entry(_NO_QUANTISED_FUSION, "1")
            keep_unpacked(model, options)
            return start_session(
                model_bytes(model, options),
                options,
                providers,
                label=model.label,
                hint="`onnx-adapt check` says whether its slots are whole; a base may need "
                "operators or providers that are not here",
            )

        self._label = model.label
        self._session, self.exact = (
            start_exactly(start) if exact else (start(ort.SessionOptions()), False)
        )
        self._unfed = required_feeds(read_manifest(model.proto), base_values(model))
        self.outputs = [item.name for item in self._session.get_outputs()]

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> Values:
        """Run the model once; slots that must be fed and are not are off.

        Raises:
            RunError: If ONNX Runtime refuses the inputs or fails.
        """
        names = list(self.outputs if outputs is None else outputs)
        fed = {**self._unfed, **feeds}
        values = run_session(self._session, names, fed, label=self._label)
        return dict(zip(names, values, strict=True))


def size_of(values: Mapping[str, Any]) -> int:
    """How many numbers inputs or outputs have in all."""
    return sum(array.size for value in values.values() for array in as_arrays(value))


def as_arrays(value: Any) -> list[np.ndarray[Any, np.dtype[Any]]]:
    """The arrays inside an output: itself, the items of a sequence, the values of a map."""
    if isinstance(value, list):
        return [array for item in value for array in as_arrays(item)]
    if isinstance(value, dict):
        return [array for key in sorted(value) for array in as_arrays(value[key])]
    return [np.asarray(value)]
