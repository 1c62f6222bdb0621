"""Verification inside If, Loop and Scan, and of outputs and weights of every kind."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from slot_models import BRANCHES, dense, model_of, passes, proto_of, saved

import onnx_adapt as oa

X = np.random.default_rng(9).standard_normal((3, 4)).astype(np.float32)


def test_made_up_inputs_reach_both_branches_of_a_truth_value() -> None:
    base = model_of(BRANCHES)
    assert passes(base, oa.insert(base, after=["yes", "no"]), strict=True).warnings == ()


def test_branches_that_made_up_inputs_do_not_reach_are_named() -> None:
    base = model_of(
        BRANCHES.replace("bool c)", "float q)").replace(
            "[choice]", "big = Constant<value = float {1e9}>()  c = Greater(q, big)  [choice]"
        )
    )
    adapted = oa.insert(base, after=["yes", "no"])
    report = passes(base, adapted)
    assert [slot.error is not None for slot in report.slots] == [False, True]
    unseen = report.slots[0].name
    assert any(unseen in text and "not reached" in text for text in report.warnings)
    assert not oa.verify(base, adapted, strict=True).passed
    assert any(
        unseen in text and "not reached" in text
        for text in oa.verify(base, adapted, weights=False).warnings
    )


def test_two_sets_of_inputs_reach_both_branches(tmp_path: Path) -> None:
    base = model_of(BRANCHES)
    files = []
    for taken in (True, False):
        files.append(tmp_path / f"{taken}.npz")
        np.savez(files[-1], x=X, c=np.array(taken))
    adapted = oa.insert(base, after=["yes", "no", "choice"])
    report = passes(base, adapted, inputs=files, strict=True)
    assert report.warnings == ()
    assert report.shapes == ({"x": (3, 4), "c": ()},) * 2


def test_an_integer_that_picks_the_branch_is_found() -> None:
    text = BRANCHES.replace("bool c)", "int64 rate)").replace("= If(c)", "= If(c)")
    text = text.replace(
        "[choice]", "fast = Constant<value = int64 {16000}>() c = Equal(rate, fast) [choice]"
    )
    base = model_of(text)
    passes(base, oa.insert(base, after=["yes", "no"]), strict=True)


LOOP = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, int64 count) => (float[n,4] y) <{dense("w1")}>
{{
  keep = Constant<value = bool {{1}}>()
  [turns] y = Loop(count, keep, x) <
    body = b (int64 i, bool go, float[n,4] s) => (bool go_on, float[n,4] t) {{
      go_on = Identity(go)  [step] h = MatMul(s, w1)  t = Tanh(h) }}>
}}"""


@pytest.mark.parametrize("turns", [1, 3])
def test_slots_in_loops_are_read_turn_by_turn(turns: int) -> None:
    base = model_of(LOOP)
    inputs = {"x": X, "count": np.array(turns, np.int64)}
    passes(base, oa.insert(base, after=["step", "t"]), inputs=inputs, strict=True)


def test_a_loop_that_does_not_turn_reaches_no_slot() -> None:
    base = model_of(LOOP)
    inputs = {"x": X, "count": np.array(0, np.int64)}
    report = oa.verify(base, oa.insert(base, after="step"), inputs=inputs)
    assert not report.passed
    assert any("not reached" in text for text in report.warnings)


@pytest.mark.parametrize("directions", ["", ", scan_output_directions = [1, 0]"])
def test_slots_in_scans_are_read_step_by_step(directions: str) -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (float[4] y, float[n,4] ys, float[n,4] zs)
    <{dense("w1")}, float[4] zero = {{0, 0, 0, 0}}> {{
      [rows] y, ys, zs = Scan<num_scan_inputs = 1{directions}, body =
        b (float[4] s, float[4] v) => (float[4] s2, float[4] each, float[4] h2) {{
          [cell] h = MatMul(v, w1)  s2 = Add(s, h)  each = Tanh(s2)  h2 = Neg(h) }}>(zero, x)
    }}""")
    passes(base, oa.insert(base, after=["cell", "each"]), strict=True)


def test_a_branch_that_a_loop_takes_now_and_then_is_read_when_taken() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, int64 count) => (float[n,4] y) <{dense("w1")}> {{
      keep = Constant<value = bool {{1}}>()
      [turns] y = Loop(count, keep, x) <
        body = b (int64 i, bool go, float[n,4] s) => (bool go_on, float[n,4] t) {{
          go_on = Identity(go)
          odd = Cast<to = 9>(i)
          [choice] t = If(odd) <
            then_branch = p () => (float[n,4] u) {{ [deep] h = MatMul(s, w1)  u = Tanh(h) }},
            else_branch = q () => (float[n,4] v) {{ v = Neg(s) }}> }}>
    }}""")
    inputs = {"x": X, "count": np.array(3, np.int64)}
    passes(base, oa.insert(base, after="deep"), inputs=inputs, strict=True)


def test_a_loop_whose_tensor_grows_verifies() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, int64 count) => (float[m,4] y) <{dense("w1")}> {{
      keep = Constant<value = bool {{1}}>()
      [turns] y = Loop(count, keep, x) <
        body = b (int64 i, bool go, float[k,4] s) => (bool go_on, float[j,4] t) {{
          go_on = Identity(go)  [step] h = MatMul(s, w1)  t = Concat<axis = 0>(h, x) }}>
    }}""")
    inputs = {"x": X, "count": np.array(3, np.int64)}
    passes(base, oa.insert(base, after="step"), inputs=inputs, strict=True)


def test_sequence_outputs_are_compared() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (seq(float[n,4]) y) <{dense("w1")}>
    {{ [first] a = MatMul(x, w1)  b = Neg(x)  y = SequenceConstruct(a, b) }}""")
    passes(base, oa.insert(base, after="first"), strict=True)


def test_map_outputs_are_compared() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    g (float[n,4] x) => (float[n,4] unused) <{dense("w1")}>
    {{ [first] a = MatMul(x, w1)  unused = Neg(x)
       y = ai.onnx.ml.ZipMap<classlabels_int64s = [1, 2, 3, 4]>(a) }}""")
    output = base.proto.graph.output.add(name="y").type.sequence_type.elem_type.map_type
    output.key_type = onnx.TensorProto.INT64
    output.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    report = passes(base, oa.insert(base, after="first"), strict=True)
    assert "2 outputs" in report.checks[0].detail


def test_strings_pass_through() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, string[m] s) => (float[n,4] y, string[m] t) <{dense("w1")}>
    {{ [first] y = MatMul(x, w1)  t = Identity(s) }}""")
    passes(base, oa.insert(base, after="first"), strict=True)


def test_integer_outputs_move_when_the_slot_is_strong_enough() -> None:
    base = model_of(f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x) => (int64[n] y) <{dense("w1")}>
    {{ [first] a = MatMul(x, w1)  y = ArgMax<axis = 1, keepdims = 0>(a) }}""")
    report = passes(base, oa.insert(base, after="first"), strict=True)
    assert report.slots[0].effect


MASKED = f"""<ir_version: 8, opset_import: ["" : 17]>
g (float[n,4] x, bool[4] keep) => (float[n,4] y) <{dense("w1")}> {{
  [first] a = MatMul(x, w1)
  least = Constant<value = float {{-3e38}}>()
  never = Mul(least, least)
  [masked] b = Where(keep, a, never)
  y = {{op}}
}}"""
KEEP = {"x": X, "keep": np.array([True, False, True, True])}


def test_infinities_that_a_mask_brings_are_equal_infinities() -> None:
    base = model_of(MASKED.replace("{op}", "Reciprocal(b)"))
    adapted = oa.insert(base, after="masked", source="first")
    passes(base, adapted, inputs=KEEP, strict=True)


def test_a_slot_that_reads_infinities_fails_in_the_report_and_warns_of_nothing_else() -> None:
    base = model_of(MASKED.replace("{op}", "Reciprocal(b)"))
    report = oa.verify(base, oa.insert(base, after="masked"), inputs=KEEP)
    assert [check.name for check in report.checks if not check.passed] == ["on"]


@pytest.mark.parametrize("place", ["initializer", "constant", "branch", "typed"])
def test_large_weights_stay_in_the_file_wherever_they_are(place: str, tmp_path: Path) -> None:
    big = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    proto = proto_of(
        f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, bool c) => (float[n,4] y) <{dense("w1")}> {{
      [first] a = MatMul(x, w1)
      [choice] y = If(c) <
        then_branch = t () => (float[n,4] u) <float[1] here = {{0}}> {{
          [wide] h = MatMul(a, w)  axis = Constant<value_ints = [1]>()
          m = ReduceMean<axes = [1]>(h)  u = Mul(a, m) }},
        else_branch = e () => (float[n,4] v) {{ v = Neg(a) }}>
    }}""".replace("MatMul(a, w)", "MatMul(a, w1)")
    )
    tensor = numpy_helper.from_array(big, "w")
    body = proto.graph.node[1].attribute[0].g
    body.node[0].input[1] = "w"
    if place == "typed":
        tensor = onnx.helper.make_tensor("w", 1, big.shape, big.ravel())
    if place == "constant":
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    elif place == "branch":
        body.initializer.append(tensor)
    else:
        proto.graph.initializer.append(tensor)
    onnx.save(proto, tmp_path / "base.onnx")
    base = oa.open_model(tmp_path / "base.onnx")
    assert len(base.payloads) == 1
    adapted = saved(oa.insert(base, after=["first", "wide"]), tmp_path / "adapted.onnx")
    passes(tmp_path / "base.onnx", adapted, strict=True)
    passes(base, oa.insert(base, after="first"))
