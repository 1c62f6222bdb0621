"""Inputs and outputs bound to memory, with another adapter in each run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_adapt.errors import AdapterError, RunError
from onnx_adapt.ort import onnxruntime, shortened
from onnx_adapt.session.ort_adapter import OrtAdapter


class AdapterBinding:
    """An IOBinding of ONNX Runtime for runs with adapters.

    ONNX Runtime cannot unbind a single input, so the weights bound for one run would stay
    for the next. This binding records every call and binds anew when the adapter changes.

    Attributes:
        inputs: What is bound to each input.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._adapter: OrtAdapter | None = None
        self._binding: Any = None
        self._ran = False
        self._calls: dict[tuple[str, str], tuple[str, tuple[Any, ...]]] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """What is bound to each input."""
        return {name: call for (kind, name), call in self._calls.items() if kind == "input"}

    @property
    def readable(self) -> dict[str, Any]:
        """The array or OrtValue bound to each input; None for memory by its address."""
        return {
            name: None if method == "bind_input" else arguments[1]
            for name, (method, arguments) in self.inputs.items()
        }

    def bind_cpu_input(self, name: str, array: Any) -> None:
        """Bind an input to an array in memory of the CPU; one that is not dense is copied."""
        self._bind("input", "bind_cpu_input", name, np.asarray(array, order="C"))

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: Any,
        shape: Any,
        buffer_ptr: int,
    ) -> None:
        """Bind an input to memory of a device."""
        place = (device_type, device_id, element_type, shape, buffer_ptr)
        self._bind("input", "bind_input", name, *place)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        """Bind an input to an OrtValue."""
        self._bind("input", "bind_ortvalue_input", name, value)

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Any = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Bind an output to a device, or to memory on it."""
        place = (device_type, device_id, element_type, shape, buffer_ptr)
        self._bind("output", "bind_output", name, *place)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        """Bind an output to an OrtValue."""
        self._bind("output", "bind_ortvalue_output", name, value)

    def _bind(self, kind: str, method: str, name: str, *place: Any) -> None:
        self._calls[(kind, name)] = (method, (name, *place))
        self._binding, self._ran = None, False

    def belongs_to(self, session: Any) -> bool:
        """Whether it binds the inputs and outputs of a session of ONNX Runtime."""
        return self._session is session

    def refuse_first_past(self, adapter: OrtAdapter | None) -> None:
        """Refuse an adapter that would change what is bound.

        Raises:
            AdapterError: If it is the first past of a decoder.
        """
        if adapter is not None and adapter.initial_state:
            raise AdapterError(
                "the adapter is the first past of a decoder, which changes what is bound",
                hint="use `run` or `run_with_ort_values`",
            )

    def run(self, weights: Mapping[str, Any], adapter: OrtAdapter | None) -> None:
        """Run with these weights bound too; `AdapterSession` calls this."""
        self._ran = False
        try:
            follows = adapter is not None and adapter.invocation_tokens  # what is bound
            if self._binding is None or self._adapter is not adapter or follows:
                self._binding = None
                self._binding = self._bound(weights)
                self._adapter = adapter
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # of any class: ONNX Runtime's own and Python's
            self._binding = None
            raise RunError(
                f"the bound model does not run: {shortened(error)}",
                hint="is every input and output bound to memory that fits?",
            ) from error
        self._ran = True

    def _bound(self, weights: Mapping[str, Any]) -> Any:
        """Make a new IOBinding, and bind everything to it."""
        binding = onnxruntime().IOBinding(self._session)
        for method, arguments in self._calls.values():
            getattr(binding, method)(*arguments)
        for name, value in weights.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def get_outputs(self) -> list[Any]:
        """The outputs of the last run as OrtValues, in the order they were bound."""
        return list(self._done().get_outputs())

    def copy_outputs_to_cpu(self) -> list[Any]:
        """The outputs of the last run as arrays, in the order they were bound."""
        return list(self._done().copy_outputs_to_cpu())

    def _done(self) -> Any:
        if not self._ran:
            raise RunError(
                "nothing has run since the last binding", hint="call run_with_iobinding first"
            )
        return self._binding
