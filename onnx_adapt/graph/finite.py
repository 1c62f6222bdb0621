"""Models that never end: functions that call themselves."""

from __future__ import annotations

from onnx_adapt.errors import ModelFileError
from onnx_adapt.model import walk
from onnx_adapt.model.file import Model

_MOST_NODES = 1 << 20


def require_finite(model: Model) -> None:
    """Refuse functions that call themselves, or each other too often to be written out.

    ONNX and ONNX Runtime go into each call, and run for ever or crash.

    Raises:
        ModelFileError: If there are any.
    """
    if model.proto.functions and walk.inlines_to_more_than(model.proto, _MOST_NODES):
        raise ModelFileError(
            f"the functions of {model.label} call themselves, or each other without end",
            hint=f"no runtime takes that; inlined they may have {_MOST_NODES} nodes",
        )
