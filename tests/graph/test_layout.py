"""Which axis has the features: what operators tell, how axes move, and what is refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from sites_models import every, layers, model, over
from slot_models import run

import onnx_adapt as oa
from onnx_adapt.errors import SiteError, SiteRefusedError

# What reads a tensor tells where its features are


NHWC = "com.microsoft.QLinearConv<channels_last=1>"


@over(
    "read axis width",
    """
    convolution     | z = Conv(y, k)                                       |  1 | 3
    transposed      | z = ConvTranspose(y, kt)                             |  1 | 3
    maximum         | z = MaxPool<kernel_shape=[2, 2]>(y)                  |  1 | 3
    average         | z = AveragePool<kernel_shape=[2, 2]>(y)              |  1 | 3
    whole picture   | z = GlobalAveragePool(y)                             |  1 | 3
    means of each   | z = MeanVarianceNormalization(y)                     |  1 | 3
    batches         | z = BatchNormalization(y, s3, s3, s3, s3)            |  1 | 3
    instances       | z = InstanceNormalization(y, s3, s3)                 |  1 | 3
    neighbours      | z = LRN<size=1>(y)                                   |  1 | 3
    pixel unshuffle | z = SpaceToDepth<blocksize=2>(y)                     |  1 | 3
    larger picture  | z = Resize(y, none, scales)                          |  1 | 3
    channel scale   | z = Mul(y, s311)                                     |  1 | 3
    linear          | z = MatMul(y, m)                                     | -1 | 6
    layer norm      | z = LayerNormalization<axis=-1>(y, s6)               | -1 | 6
    scale           | z = Mul(y, s6)                                       | -1 | 6
    NHWC            | z = com.microsoft.NhwcFusedConv(y, k)                | -1 | 6
    NHWC, quantised | z = {nhwc}(y, one, one, k, one, one, one, one) | -1 | 6
    """,
)
def test_a_reader_tells_where_the_features_are(read: str, axis: str, width: str) -> None:
    stored = ("k 8 3 1 1", "kt 3 8 1 1", "s3 3", "s311 3 1 1", "s6 6", "m 6 5")
    text = f"""g (float[B,3,4,6] x) => (float[D] out) {{
      none = Constant<value = float[0] {{}}>()
      scales = Constant<value = float[4] {{1, 1, 2, 2}}>()
      y = Relu(x) {read.format(nhwc=NHWC)} out = Identity(z)
    }}"""
    site = every(model(text, *stored, "one", opset=18))["y"]
    assert (site.axis, site.width) == (int(axis), int(width))


# Axes are followed exactly, in both directions


@over(
    "body axis width",
    """
    NHWC | y = Transpose<perm=[0, 2, 3, 1]>(h) | -1 | 8
    and back | t = Transpose<perm=[0, 2, 3, 1]>(h) y = Transpose<perm=[0, 3, 1, 2]>(t) | 1 | 8
    elsewhere | y = Transpose<perm=[0, 2, 1, 3]>(h) | 2 | 8
    pixels merged | y = Reshape(h, to_rows) | 1 | 8
    a matrix | y = Flatten(h) | -1 | 128
    of its pixels | t = Transpose<perm=[0, 2, 3, 1]>(h) y = Reshape(t, pixels) | -1 | 8
    squeezed | p = GlobalAveragePool(h) y = Squeeze(p, a23) | -1 | 8
    means | y = ReduceMean<keepdims=0>(h, a23) | -1 | 8
    unsqueezed | p = ReduceMean<keepdims=0>(h, a23) y = Unsqueeze(p, a23) | 1 | 8
    one row | y = Gather<axis=2>(h, zero) | 1 | 8
    a constant in front | r = Reshape(h, to_rows) y = MatMul(mix, r) | 1 | 2
    letters | y = Einsum<equation = "bchw->bhwc">(h) | -1 | 8
    its Linear | y = Einsum<equation = "bchw,cd->bhwd">(h, v) | -1 | 5
    """,
)
def test_an_axis_is_followed_from_a_layer(body: str, axis: str, width: str) -> None:
    text = f"""g (float[B,3,4,4] x) => (float[D] out) {{
      to_rows = Constant<value = int64[3] {{0, 8, -1}}>()
      pixels = Constant<value = int64[2] {{-1, 8}}>()
      a23 = Constant<value = int64[2] {{2, 3}}>()
      zero = Constant<value = int64 {{0}}>()
      h = Conv(x, w) {body} out = Identity(y)
    }}"""
    site = every(model(text, "w 8 3 1 1", "v 8 5", "mix 2 8", opset=18))["y"]
    assert (site.axis, site.width) == (int(axis), int(width))
    assert (site.refused is None) == (site.axis in (-1, 1))


@over(
    "sizes",
    """
    numbers       | s = Constant<value = int64[3] {2, 8, 16}>()
    copies        | s = Constant<value = int64[3] {0, 0, -1}>()
    one unknown   | s = Constant<value = int64[3] {-1, 8, 16}>()
    computed | n = Shape<end=2>(h) s = Concat<axis=0>(n, rest)
    piece by piece | n = Shape(h) b = Gather(n, zero) s = Concat<axis=0>(b, eight, rest)
    """,
)
@pytest.mark.parametrize("batch", ["2", "B"])
def test_a_reshape_is_followed_whatever_tells_its_sizes(sizes: str, batch: str) -> None:
    text = f"""g (float[{batch},3,4,4] x) => (float[D] out) {{
      rest = Constant<value = int64[1] {{-1}}>()
      eight = Constant<value = int64[1] {{8}}>()
      zero = Constant<value = int64[1] {{0}}>()
      h = Conv(x, w) {sizes} y = Reshape(h, s)
      t = Transpose<perm=[0, 2, 1]>(y) out = Identity(t)
    }}"""
    made = every(model(text, "w 8 3 1 1"))
    assert (made["y"].axis, made["t"].axis) == (1, -1)


def test_a_shape_that_is_computed_in_one_of_two_bodies_is_its_own() -> None:
    text = """g (float[B,3,4,4] x, bool c) => (float y) {
      h = Conv(x, w)
      y = If(c) <
        then_branch = t () => (float p) {
          s = Constant<value = int64[3] {0, 8, 16}>()
          r = Reshape(h, s)
          p = ReduceSum<keepdims=0>(r)},
        else_branch = e () => (float q) {
          s = Constant<value = int64[3] {0, 2, 64}>()
          r = Reshape(h, s)
          q = ReduceSum<keepdims=0>(r)}>
    }"""
    sites = {s.address: s for s in oa.find_sites(model(text, "w 8 3 1 1"), all_tensors=True)}
    tensors = {a.split(".")[-1]: (s.axis, s.width) for a, s in sites.items()}
    assert tensors["then_branch:r"] == (1, 8)
    assert tensors["else_branch:r"] == (None, None)


def test_axes_go_through_a_loop_and_a_scan() -> None:
    text = """g (float[B,3,9] x, int64 n, bool c) => (float[B,6,9] y, float[9,B,6] z) {
      h = Conv(x, w)
      y = Loop(n, c, h) <body = l (int64 i, bool g, float[B,6,9] s)
        => (bool g2, float[B,6,9] r) {g2 = Identity(g) r = Relu(s)}>
      z = Scan<num_scan_inputs=1, scan_input_axes=[2],
        body = k (float[B,6] a) => (float[B,6] b) {b = Tanh(a)}>(h)
    }"""
    made = every(model(text, "w 6 3 1"))
    assert {name: made[name].axis for name in "ryzb"} == {"r": 1, "y": 1, "z": -1, "b": -1}


def test_axes_go_through_functions_and_their_layers_tell() -> None:
    text = """g (float[B,5,8] x) => (float[B,5,6] y) {
      h = local.Linear(x, w)
      y = Relu(h)
    }
    <domain: "local", opset_import: ["": 17]>
    Linear (a, v) => (b) {b = MatMul(a, v)}"""
    made = every(model(text, "w 8 6"))
    assert [(made[t].axis, made[t].width) for t in "hy"] == [(-1, 6), (-1, 6)]


def test_heads_of_an_attention_can_take_an_adapter_and_its_scores_cannot() -> None:
    text = """g (float[B,S,8] x) => (float[B,S,8] y) {
      split = Constant<value = int64[4] {0, 0, 2, 4}>()
      merge = Constant<value = int64[3] {0, 0, 8}>()
      q0 = MatMul(x, w) q1 = Reshape(q0, split) q = Transpose<perm=[0, 2, 1, 3]>(q1)
      k0 = MatMul(x, w) k1 = Reshape(k0, split) k = Transpose<perm=[0, 2, 3, 1]>(k1)
      v0 = MatMul(x, w) v1 = Reshape(v0, split) v = Transpose<perm=[0, 2, 1, 3]>(v1)
      s = MatMul(q, k) p = Softmax(s)
      o = MatMul(p, v) o1 = Transpose<perm=[0, 2, 1, 3]>(o) o2 = Reshape(o1, merge)
      y = MatMul(o2, w)
    }"""
    made = every(model(text, "w 8 8"))
    assert {
        n: (made[n].axis, made[n].width) for n in ("q1", "q", "k1", "v", "o", "o1")
    } == dict.fromkeys(("q1", "q", "k1", "v", "o", "o1"), (-1, 4))
    assert "on axis 2" in str(made["k"].refused)
    assert "sums over its features" in str(made["s"].refused)
    assert "sums over its features" in str(made["p"].refused)


# Refused where nothing tells, or two tell otherwise


@over(
    "body reason",
    """
    no sign       | y = Relu(x)                                        | nothing tells
    a picture | m = MatMul(f, v) r = Relu(m) y = Reshape(r, picture) | splits or merges
    groups        | h = Conv(x, w) y = Reshape(h, groups)              | splits or merges
    with the batch| h = Conv(x, w) y = Reshape(h, mixed)               | splits or merges
    disagreement | y = Relu(x) a = MatMul(y, n) b = MaxPool<kernel_shape=[1, 1]>(y) | disagree
    one channel   | h = Conv(x, w) y = Gather<axis=1>(h, zero)         | takes one of
    """,
)
def test_an_unknown_feature_axis_is_refused_with_the_reason(body: str, reason: str) -> None:
    text = f"""g (float[B,3,4,4] x, float[B,8] f) => (float[D] out) {{
      groups = Constant<value = int64[3] {{0, 4, -1}}>()
      mixed = Constant<value = int64[2] {{-1, 16}}>()
      picture = Constant<value = int64[4] {{0, 1, 4, 4}}>()
      zero = Constant<value = int64 {{0}}>()
      {body} out = Identity(y)
    }}"""
    made = model(text, "w 8 3 1 1", "v 8 16", "n 4 4")
    site = every(made)["y"]
    assert reason in str(site.refused)
    assert (site.axis, site.width) == (None, None)
    with pytest.raises(SiteRefusedError, match=reason):
        oa.insert(made, after="y")


def test_a_disagreement_names_both_sides() -> None:
    text = """g (float[B,3,4,4] x) => (float[D] out) {
      y = Relu(x) [fc] a = MatMul(y, n) [pool] b = MaxPool<kernel_shape=[1, 1]>(y)
      out = Add(a, b)
    }"""
    reason = str(every(model(text, "n 4 4"))["y"].refused)
    assert "axis 1 (MaxPool 'pool')" in reason
    assert "axis 3 (MatMul 'fc')" in reason


def test_a_residual_stream_between_mixers_of_tokens_is_that_of_the_norms() -> None:
    text = """g (float[B,6,8] x) => (float[B,6,8] y) {
      n = LayerNormalization<axis=-1>(x, s)
      t = Transpose<perm=[0, 2, 1]>(n) m = MatMul(t, w) u = Transpose<perm=[0, 2, 1]>(m)
      r = Add(u, x)
      y = LayerNormalization<axis=-1>(r, s)
    }"""
    made = every(model(text, "s 8", "w 6 6"))
    assert [(made[t].axis, made[t].width) for t in ("m", "r")] == [(-1, 6), (-1, 8)]


# The user knows


GUESS = "g (float[B,5,7] x) => (float[B,5,7] y) {[act] y = Relu(x)}"


@pytest.mark.parametrize(
    ("axis", "slot_axis", "width"), [(-1, -1, 7), (2, -1, 7), (1, 1, 5), (-2, 1, 5)]
)
def test_the_user_names_the_axis_from_either_end(
    axis: int, slot_axis: int, width: int
) -> None:
    base = model(GUESS)
    adapted = oa.insert(base, after="act", axis=axis)
    (slot,) = oa.list_slots(adapted)
    assert (slot.axis, slot.width) == (slot_axis, width)
    oa.verify(base, adapted).raise_for_mismatch()
    assert oa.remove(adapted).proto == base.proto


@pytest.mark.parametrize(
    ("axis", "reason"), [(0, "axis 0"), (3, "no axis 3"), (-4, "no axis -4")]
)
def test_an_axis_that_cannot_have_features_is_refused(axis: int, reason: str) -> None:
    with pytest.raises(SiteRefusedError, match=reason):
        oa.insert(model(GUESS), after="act", axis=axis)


def test_where_the_axis_is_unknown_the_hint_names_what_works() -> None:
    with pytest.raises(SiteRefusedError) as caught:
        oa.insert(model(GUESS), after="act")
    assert caught.value.hint.endswith("--axis -1 (7 wide) or --axis 1 (5 wide)")


def test_an_axis_against_the_weight_of_a_layer_is_refused() -> None:
    text = "g (float[B,3,4,4] x) => (float[B,8,4,4] y) {[conv] y = Conv(x, w)}"
    with pytest.raises(
        SiteRefusedError, match="has 4 entries, but the layer's weight gives 8"
    ) as e:
        oa.insert(model(text, "w 8 3 1 1"), after="conv", axis=-1)
    assert e.value.hint == "leave out the axis: the operators around it say 1"


def test_the_source_of_an_adapter_is_on_the_axis_of_its_target() -> None:
    text = """g (float[B,3,4,4] x) => (float[B,8,4,4] y) {
      h = Conv(x, w) y = Relu(h)
    }"""
    base = model(text, "w 8 3 1 1")
    adapted = oa.insert(base, after="y", source="x")
    (slot,) = oa.list_slots(adapted)
    assert (slot.axis, slot.width, slot.source_width) == (1, 8, 3)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 4), np.float32)
    down, up = rng.standard_normal((2, 3), np.float32), rng.standard_normal((8, 2), np.float32)
    (off,) = run(base, {"x": x})
    fed = {slot.weight("down"): down[..., None, None], slot.weight("up"): up[..., None, None]}
    (on,) = run(adapted, {"x": x, **fed})
    hidden = np.maximum(np.einsum("rc,bchw->brhw", down, x), 0)
    expected = off + np.einsum("kr,brhw->bkhw", up, hidden)
    np.testing.assert_allclose(on, expected, rtol=1e-5, atol=1e-5)


def test_a_source_whose_axis_nothing_tells_is_refused() -> None:
    text = """g (float[B,5,8] x, float[B,5,8] z) => (float[B,5,8] y, float[B,5,8] o) {
      y = MatMul(x, w) o = Relu(z)
    }"""
    base = model(text, "w 8 8")
    with pytest.raises(SiteError, match="nothing tells") as caught:
        oa.insert(base, after="y", source="z")
    assert "--axis" in caught.value.hint
    (slot,) = oa.list_slots(oa.insert(base, after="y", source="z", axis=-1))
    assert slot.source_width == 8


# Sites stay what they were when slots are in


@pytest.mark.parametrize("case", ["gn8", "shuffle", "nhwc", "convnext", "patches"])
def test_slots_do_not_change_where_features_are(case: str) -> None:
    base = oa.open_model(
        Path(__file__).parent.parent / "cases" / f"layout_{case}" / "torchscript.onnx"
    )
    before = every(base)
    good = [site.address for site in before.values() if site.refused is None]
    adapted = oa.insert(base, after=good)
    after = every(adapted)
    told = {n: (s.axis, s.width, s.refused) for n, s in before.items()}
    assert {n: (after[n].axis, after[n].width, after[n].refused) for n in told} == told


# The command


def _insert(base: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("onnx-adapt")
    command = [program, "insert", base, "-o", base.with_name("adapted.onnx"), *options]
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


@pytest.mark.parametrize(("axis", "shown"), [("last", "-1"), ("-1", "-1"), ("1", "1")])
def test_the_table_of_insert_has_the_axis(axis: str, shown: str, tmp_path: Path) -> None:
    onnx.save(model(GUESS).proto, tmp_path / "base.onnx")
    done = _insert(tmp_path / "base.onnx", "--after", "act", "--axis", axis)
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    assert header.split()[:5] == ["slot", "tensor", "places", "width", "axis"]
    assert row.split()[2:5:2] == ["1", shown]


def test_an_axis_that_is_no_number_is_a_usage_error(tmp_path: Path) -> None:
    onnx.save(model(GUESS).proto, tmp_path / "base.onnx")
    done = _insert(tmp_path / "base.onnx", "--after", "act", "--axis", "first")
    assert done.returncode == 2
    assert "give -1, last or 1" in done.stderr


def test_layers_keep_the_axis_of_their_operator_whatever_reads_them() -> None:
    text = """g (float[B,3,6] x) => (float[B,8,5] y) {
      h = Conv(x, w) y = MatMul(h, v)
    }"""
    made = layers(model(text, "w 8 3 1", "v 6 5"))
    assert [(made[t].axis, made[t].width) for t in ("h", "y")] == [(1, 8), (-1, 5)]
