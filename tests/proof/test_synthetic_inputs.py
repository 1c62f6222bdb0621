"""Inputs that are made up: of which sizes and values, and that they stay small."""

import subprocess
import sys

import numpy as np
import pytest
from slot_models import model_of

from onnx_adapt.errors import UnprovableError
from onnx_adapt.proof.inputs import inputs_for

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
PIXELS = """<ir_version: 9, opset_import: ["" : 17]>
g (float[n,3,height,width] x) => (float[n,p,3] y)
<int64[3] flat = {0, 3, -1}, float[3,3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}> {
  pooled = MaxPool<kernel_shape = [LEAST, LEAST]>(x)  m = ReduceMean<keepdims = 0>(pooled)
  k = Reshape(x, flat)  t = Transpose<perm = [0, 2, 1]>(k)  [query] q = MatMul(t, w)
  scores = MatMul(q, k)  p = Softmax(scores)  o = MatMul(p, t)  y = Add(o, m) }"""
"""Attention among all pixels of a picture of at least LEAST by LEAST."""


def made_up(text: str) -> list[dict[str, np.ndarray]]:
    return inputs_for(model_of(text))


def shapes(text: str) -> list[tuple[int, ...]]:
    return [feeds["x"].shape for feeds in made_up(text)]


@pytest.mark.parametrize(
    ("declared", "first", "second"),
    [
        ("float[n,3,height,width] x", (1, 3, 32, 32), (2, 3, 32, 64)),
        ("float[a,b,c,d] x", (1, 3, 32, 32), (2, 3, 32, 64)),
        ("float[a,3,c,d] x", (1, 3, 32, 32), (2, 3, 32, 64)),
        ("uint8[n,h,w,3] x", (1, 32, 32, 3), (2, 32, 64, 3)),
        ("float[height,width,3] x", (32, 32, 3), (32, 64, 3)),
        ("float[n,t,64] x", (1, 12, 64), (2, 9, 64)),
        ("float[batch,4,past_length,8] x", (1, 4, 0, 8), (2, 4, 0, 8)),
        ("float[n,3,224,224] x", (1, 3, 224, 224), (2, 3, 224, 224)),
        ("float[2,3] x", (2, 3), None),
    ],
)
def test_an_open_axis_gets_a_size_of_its_kind(
    declared: str, first: tuple, second: tuple | None
) -> None:
    text = f"{HEAD} g ({declared}) => (int64[r] y) {{ y = Shape(x) }}"
    assert shapes(text) == [first] + ([second] if second else [])


def exactly(declared: str, size: int) -> str:
    """A model that runs only where the last axis has this size, or 1."""
    zeros = ", ".join(["0"] * size)
    return f"""{HEAD} g ({declared}) => (int64[r] y) <float[{size}] v = {{{zeros}}}> {{
      z = Add(x, v)  y = Shape(z) }}"""


@pytest.mark.parametrize(
    ("declared", "size"),
    [
        ("float[n,samples] x", 16000),
        ("float[n,1,t] x", 3200),
        ("float[n,80,frames] x", 3000),
        ("float[n,3,height,width] x", 224),
    ],
)
def test_a_size_that_works_is_kept_and_only_the_batch_changes(
    declared: str, size: int
) -> None:
    found = shapes(exactly(declared, size))
    assert [shape[-1] for shape in found] == [size, size]
    assert [shape[0] for shape in found] == [1, 2]


def test_no_picture_is_as_long_as_a_sound() -> None:
    with pytest.raises(UnprovableError, match="none of the inputs") as caught:
        made_up(exactly("float[n,3,height,width] x", 16000))
    assert "numpy.savez" in caught.value.hint


@pytest.mark.parametrize("least", [3, 40, 200])
def test_attention_among_pixels_does_not_fill_the_memory(least: int) -> None:
    """At 224 by 224 it would take 10 GB; what is not run is refused instead."""
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "import onnx.parser\n"
        "from onnx_adapt.errors import UnprovableError\n"
        "from onnx_adapt.model.file import Model\n"
        "from onnx_adapt.proof.inputs import inputs_for\n"
        "try:\n"
        "    inputs_for(Model(onnx.parser.parse_model(sys.argv[1])))\n"
        "except UnprovableError: print('refused')\n"
        # The peak that `resource` tells has the parent's in it.
        "status = Path('/proc/self/status').read_text()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', status)[1])\n"
    )
    text = PIXELS.replace("LEAST", str(least))
    done = subprocess.run(
        [sys.executable, "-c", code, text], capture_output=True, text=True, check=True
    )
    *refused, peak = done.stdout.split()
    assert refused == (["refused"] if least == 200 else [])
    assert int(peak) < 1_000_000  # kB


def test_fixed_sizes_that_are_too_large_are_refused() -> None:
    with pytest.raises(UnprovableError, match="100000000 elements"):
        made_up(f"{HEAD} g (float[n,10000,10000] x) => (int64[r] y) {{ y = Shape(x) }}")


def test_inputs_that_share_a_symbol_share_its_size() -> None:
    text = f"""{HEAD} g (int64[batch,sequence] x, int64[batch,sequence] attention_mask,
    int64[batch,sequence] token_type_ids) => (int64[batch,sequence] y) {{
      s = Add(x, attention_mask)  y = Add(s, token_type_ids) }}"""
    for feeds, shape in zip(made_up(text), [(1, 12), (2, 9)], strict=True):
        assert {value.shape for value in feeds.values()} == {shape}
        assert feeds["attention_mask"].all()


@pytest.mark.parametrize("mask", ["past_length + length", "total_sequence_length"])
def test_a_mask_is_as_long_as_the_past_and_the_rest(mask: str) -> None:
    proto = model_of(f"""{HEAD} g (float[b,2,past_length,4] past, float[b,2,length,4] x,
    float[b,1,1,m] mask) => (float[b,2,r,m] y) {{
      k = Concat<axis = 2>(past, x)  t = Transpose<perm = [0, 1, 3, 2]>(k)
      scores = MatMul(x, t)  y = Add(scores, mask) }}""")
    proto.proto.graph.input[2].type.tensor_type.shape.dim[3].dim_param = mask
    first, second = inputs_for(proto)
    assert [feeds["past"].shape[2] for feeds in (first, second)] == [0, 0]
    assert [feeds["mask"].shape[3] for feeds in (first, second)] == [12, 9]


def test_a_past_that_must_not_be_empty_is_not() -> None:
    (first, _) = made_up(f"""{HEAD} g (float[b,past_length,4] x) => (float[b,8,4] y)
    <float[8,1] v = {{0, 0, 0, 0, 0, 0, 0, 0}}> {{ y = Add(x, v) }}""")
    assert first["x"].shape == (1, 8, 4)


def test_ids_stay_inside_their_table_also_where_a_body_looks_them_up() -> None:
    text = f"""{HEAD} g (int64[n,t] x, bool c) => (float[n,t,2] y)
    <float[3,2] few = {{1, 2, 3, 4, 5, 6}}> {{
      y = If(c) <then_branch = a () => (float[n,t,2] p) {{ p = Gather(few, x) }},
        else_branch = b () => (float[n,t,2] p) {{ q = Gather(few, x)  p = Neg(q) }}> }}"""
    first, second = made_up(text)
    assert set(first["x"].flat) == {0, 1, 2}
    assert (first["c"], second["c"]) == (True, False)


def test_numbers_and_truth_values_of_a_detector_are_made_up() -> None:
    text = f"""{HEAD} g (float[n,b,4] x, float[n,c,b] scores, int64[1] most, float[1] iou,
    float[1] least) => (int64[k,3] y) {{
      y = NonMaxSuppression(x, scores, most, iou, least) }}"""
    first, _ = made_up(text)
    assert first["x"].shape == (1, 12, 4)
    assert first["scores"].shape == (1, 12, 12)


def test_texts_are_made_up() -> None:
    (first, second) = made_up(f"{HEAD} g (string[n] x) => (int64[1] y) {{ y = Shape(x) }}")
    assert first["x"].tolist() == ["a"]
    assert second["x"].tolist() == ["a", "a"]
