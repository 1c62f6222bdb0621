"""Labels from a teacher: what another model gives for the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from tempfile import TemporaryFile, gettempdir

import numpy as np

from onnx_adapt.dtypes import Array
from onnx_adapt.errors import SaveError, TrainingError
from onnx_adapt.model.file import Model
from onnx_adapt.ort import read_providers
from onnx_adapt.proof.runner import ProviderArgument, Runner
from onnx_adapt.slot.manifest import read_manifest
from onnx_adapt.training.data import Dataset, Group
from onnx_adapt.training.step_model import choose_output

_ROWS = 32
"""Samples in one run of the teacher."""


def taught(
    data: Dataset, teacher: Model, *, output: str = "", provider: ProviderArgument = None
) -> Dataset:
    """The samples with what a teacher gives for them as their labels.

    Args:
        data: Samples; their own labels are dropped.
        teacher: A model with the same inputs, or some of them.
        output: The teacher's output; by default its only float output.
        provider: Where to run it.

    Raises:
        TrainingError: If the teacher reads what the samples lack, or gives NaN.
        RunError: If ONNX Runtime refuses the samples.
    """
    chosen = choose_output(teacher, output)
    manifest = read_manifest(teacher.proto)
    own = {name for slot in manifest.slots for name in slot.inputs} if manifest else set()
    own |= {tensor.name for tensor in teacher.proto.graph.initializer}
    wanted = [v.name for v in teacher.proto.graph.input if v.name not in own]
    if missing := [name for name in wanted if name not in data.groups[0].inputs]:
        raise TrainingError(
            f"{data.label} has no {missing[0]!r}, which the teacher {teacher.label} reads"
        )
    runner = Runner(teacher, read_providers(provider), optimised=True)

    def lessons(group: Group) -> Iterator[Array]:
        for start in range(0, len(group.numbers), _ROWS):
            batch = data.read(group, np.arange(start, min(start + _ROWS, len(group.numbers))))
            feeds = {name: np.asarray(batch.inputs[name]) for name in wanted}
            given = runner.run(feeds, [chosen])[chosen]
            if not np.isfinite(given).all():
                raise TrainingError(f"the teacher gives NaN or infinity on {batch.name}")
            yield given

    groups = (replace(group, labels=_on_disk(lessons(group))) for group in data.groups)
    return replace(data, groups=tuple(groups), classes=())


def _on_disk(parts: Iterable[Array]) -> Array:
    """Arrays one after the other in a temporary file, which is gone when nobody reads it.

    The logits of a vocabulary for each token are more than fits in memory.

    Raises:
        SaveError: If there is no room for them.
    """
    rows = 0
    try:
        with TemporaryFile() as file:
            for part in parts:
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
                rows += len(part)
            file.flush()
            return np.memmap(file, part.dtype, "r", shape=(rows, *part.shape[1:]))
    except OSError as error:
        raise SaveError(
            f"cannot keep what the teacher gives in {gettempdir()}: {error.strerror}",
            hint="make room, or name another folder in the variable TMPDIR",
        ) from error
