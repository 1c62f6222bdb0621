"""The table of element types: one row is all that a new one takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onnx_adapt.dtypes import DTYPES, ELEM_TYPES, FLOAT_TYPES, FLOATS, ORT_TYPES, FloatType

NEW_ROW = """
import sys
from pathlib import Path
import ml_dtypes, numpy as np
import onnx_adapt.dtypes as table

row = 'FloatType("float8_e5m2", 19, "tensor(float8e5m2)", np.dtype(ml_dtypes.float8_e5m2)),'
source = Path(table.__file__).read_text(encoding="utf-8")
exec(source.replace("FLOAT_TYPES = (", "FLOAT_TYPES = (" + row), vars(table))

import onnx_adapt as oa
from onnx_adapt.graph.index import elem_name
from onnx_adapt.model.tensors import tensor_of

assert elem_name(19) == "float8_e5m2"
eighth = np.dtype(ml_dtypes.float8_e5m2)
assert tensor_of("w", np.ones((2, 3), eighth)).data_type == 19
down, up = np.ones((4, 2), eighth), np.full((2, 4), 0.5, eighth)
adapter = oa.Adapter("a", {"fc": {"down": down, "up": up}})
read = oa.load_adapter(oa.save_adapter(adapter, f"{sys.argv[1]}/a.onnx_adapter"))
assert read.weights["fc"]["up"].dtype == eighth
assert (read.weights["fc"]["up"] == up).all()
both = oa.blend([adapter, adapter], [1, 1])
assert both.weights["fc"]["down"].shape == (4, 4)
assert both.weights["fc"]["down"].dtype == eighth
"""


def test_a_new_element_type_is_known_to_graphs_tensors_files_and_blends(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEW_ROW, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_element_type_with_a_column_missing_is_an_error() -> None:
    with pytest.raises(TypeError, match="dtype"):
        FloatType("float32", 1, "tensor(float)")  # type: ignore[call-arg]


def test_every_name_and_number_of_an_element_type_comes_from_its_row() -> None:
    for row in FLOAT_TYPES:
        assert (DTYPES[row.name], ELEM_TYPES[row.name]) == (row.dtype, row.number)
        assert FLOATS[row.number] == ORT_TYPES[row.ort] == row.name
        assert np.zeros(1, row.dtype).dtype == row.dtype
