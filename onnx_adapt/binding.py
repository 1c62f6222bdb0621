"""Inputs and outputs bound to memory, with an adapter for each run."""

from __future__ import annotations

from typing import Any

from onnx_adapt.errors import RunError
from onnx_adapt.loaded import Loaded
from onnx_adapt.ort import onnxruntime, shortened


class AdapterBinding:
    """What ONNX Runtime's IOBinding is, for runs with adapters.

    ONNX Runtime cannot unbind one input, so weights that were bound for one run would
    stay for the next. This binding remembers what was bound and starts anew whenever the
    adapter changes.

    Attributes:
        inputs: What is bound to each input.
    """

    def __init__(self, session: Any, failures: tuple[type[Exception], ...]) -> None:
        self._session = session
        self._failures = failures
        self._adapter: Loaded | None = None
        self._binding: Any = None
        self._calls: dict[tuple[str, str], tuple[str, tuple[Any, ...]]] = {}

    @property
    def inputs(self) -> dict[str, Any]:
        """What is bound to each input."""
        return {name: call for (kind, name), call in self._calls.items() if kind == "input"}

    def bind_cpu_input(self, name: str, array: Any) -> None:
        """Bind an input to an array in memory of the CPU."""
        self._bind("input", "bind_cpu_input", name, array)

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
        self._binding = None

    def run(self, weights: Any, adapter: Loaded | None) -> None:
        """Run with these weights bound as well; `AdapterSession` calls this."""
        try:
            if self._binding is None or self._adapter is not adapter:
                self._binding = onnxruntime().IOBinding(self._session)
                for method, arguments in self._calls.values():
                    getattr(self._binding, method)(*arguments)
                for name, value in weights.items():
                    self._binding.bind_ortvalue_input(name, value)
                self._adapter = adapter
            self._session.run_with_iobinding(self._binding)
        except self._failures as error:
            raise RunError(
                f"the bound model does not run: {shortened(error)}",
                hint="is every input and output bound to memory that fits?",
            ) from error

    def get_outputs(self) -> list[Any]:
        """The outputs of the last run as OrtValues, in the order they were bound."""
        return list(self._ran().get_outputs())

    def copy_outputs_to_cpu(self) -> list[Any]:
        """The outputs of the last run as arrays, in the order they were bound."""
        return list(self._ran().copy_outputs_to_cpu())

    def _ran(self) -> Any:
        if self._binding is None:
            raise RunError(
                "nothing has run since the last binding", hint="call run_with_iobinding first"
            )
        return self._binding
