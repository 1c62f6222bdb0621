"""Adapters on features that move from axis to axis, held against what PyTorch computes.

`tools/export_layouts.py` makes the cases; that of `layout_gn8` is from a bug report.
"""

from pathlib import Path

import numpy as np
import pytest
from slot_models import run

import onnx_adapt as oa

CASES = Path(__file__).parent.parent / "cases"

PLACES = """
gn8       norm          1   8
groupnorm norm          1   8
groupnorm act           1   8
shuffle   shuffle       1   8
shuffle   relu          1   8
nhwc      1             1   8
nhwc      1.act        -1   8
flatten   1             1   8
flatten   2            -1  72
patches   0            -1   8
patches   0.projection  1   8
squeeze   1             1   8
squeeze   1.gate       -1   8
convnext  1             1   8
convnext  1.act        -1  16
"""


def _named() -> list[tuple[Path, str, int, int]]:
    lines = [line.split() for line in PLACES.strip().splitlines()]
    return [
        (file, place, int(axis), int(width))
        for case, place, axis, width in lines
        for file in sorted((CASES / f"layout_{case}").glob("*.onnx"))
    ]


@pytest.mark.parametrize(("file", "place", "axis", "width"), _named())
def test_an_adapter_on_the_feature_axis_gives_what_pytorch_gives(
    file: Path, place: str, axis: int, width: int
) -> None:
    base = oa.open_model(file)
    adapted = oa.insert(base, after=place)
    (slot,) = oa.list_slots(adapted)
    assert (slot.axis, slot.width) == (axis, width)
    with np.load(file.with_name("truth.npz")) as truth:
        down, up = truth[f"{place}.down"], truth[f"{place}.up"]
        if axis == 1:  # a 1x1 convolution has (out, in, 1, 1)
            down, up = (w.T.reshape(*w.T.shape, *[1] * (slot.rank - 2)) for w in (down, up))
        (entry,) = (value.name for value in base.proto.graph.input)
        feeds = {entry: truth["x"]}
        fed = {slot.weight("down"): down, slot.weight("up"): up}
        (off,), (on,) = run(adapted, feeds), run(adapted, feeds | fed)
        np.testing.assert_allclose(off, truth["y"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(on, truth[f"{place}.y"], rtol=1e-4, atol=1e-4)
        assert np.abs(on - off).max() > 1e-2  # the adapter does something


@pytest.mark.parametrize("case", ["gn8", "shuffle", "convnext"])
def test_verify_holds_where_pytorch_agrees(case: str) -> None:
    file = CASES / f"layout_{case}" / "torchscript.onnx"
    places = [line.split()[1] for line in PLACES.strip().splitlines() if line.startswith(case)]
    base = oa.open_model(file)
    oa.verify(base, oa.insert(base, after=places)).raise_for_mismatch()
