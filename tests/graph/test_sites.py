"""Which tensors of a model are sites, and what is said of them."""

import time

import pytest
from sites_models import every, layers, model, over

from onnx_adapt import find_sites


@over(
    "x core stored width axis",
    """
    MatMul            | float[B,S,4]   | MatMul(x, w)                      | w 4 6     | 6 | -1
    Gemm              | float[B,4]     | Gemm(x, w)                        | w 4 6     | 6 | -1
    Gemm transposed   | float[B,4]     | Gemm<transB=1>(x, w)              | w 6 4     | 6 | -1
    Conv of lines     | float[B,3,9]   | Conv(x, w)                        | w 6 3 3   | 6 |  1
    Conv of pictures  | float[B,3,9,9] | Conv(x, w)                        | w 6 3 1 1 | 6 |  1
    ConvTranspose     | float[B,4,9]   | ConvTranspose<group=2>(x, w)      | w 4 3 1   | 6 |  1
    norm of instances | float[B,6,9]   | InstanceNormalization(x, w, w)    | w 6       | 6 |  1
    norm of batches   | float[B,6,9]   | BatchNormalization(x, w, w, w, w) | w 6       | 6 |  1
    norm of rows      | float[B,6]     | BatchNormalization(x, w, w, w, w) | w 6       | 6 | -1
    norm of layers    | float[B,S,6]   | LayerNormalization(x, w)          | w 6       | 6 | -1
    embedding         | int64[B,S]     | Gather(w, x)                      | w 50 6    | 6 | -1
    LSTM              | float[S,B,2]   | LSTM<hidden_size=1>(x, w, r)      | w 1 4 2   | 1 | -1
    GRU               | float[S,B,2]   | GRU<hidden_size=1>(x, w, r)       | w 1 3 2   | 1 | -1
    RNN               | float[S,B,2]   | RNN<hidden_size=1>(x, w, r)       | w 1 1 2   | 1 | -1
    """,
)
def test_the_output_of_a_layer_is_a_site(
    x: str, core: str, stored: str, width: str, axis: str
) -> None:
    text = f"g ({x} x) => (float[D] out) {{h = {core} out = com.microsoft.Gelu(h)}}"
    (site,) = find_sites(model(text, stored, "r 1 4 1"))
    assert (site.tensor, site.width, site.axis) == ("h", int(width), int(axis))
    assert (site.op, site.dtype) == (core.split("(")[0].split("<")[0], "float32")
    assert (site.address, site.refused, site.module) == ("main:h", None, None)


def test_rms_normalization_is_a_layer() -> None:
    text = "g (float[B,6] x) => (float[B,6] y) {y = RMSNormalization(x, w)}"
    site = layers(model(text, "w 6", opset=23, ir=10))["y"]
    assert (site.op, site.width, site.refused) == ("RMSNormalization", 6, None)


@over(
    "text",
    """
    MatMul | g (float[B,4] x, float[4,6] w) => (float[B,6] y) {y = MatMul(x, w)}
    Gemm   | g (float[B,4] x, float[4,6] w) => (float[B,6] y) {y = Gemm(x, w)}
    Conv   | g (float[B,3,9] x, float[6,3,1] w) => (float[B,6,9] y) {y = Conv(x, w)}
    Gather | g (float[50,6] w, int64[B] i) => (float[B,6] y) {y = Gather(w, i)}
    Relu   | g (float[B,6] x) => (float[B,6] y) {y = Relu(x)}
    """,
)
def test_an_operator_without_a_constant_weight_is_a_site_but_no_layer(text: str) -> None:
    made = model(text)
    assert find_sites(made) == []
    assert [(s.tensor, s.refused) for s in find_sites(made, all_tensors=True)] == [("y", None)]


def test_only_a_float_table_gathered_by_computed_rows_is_an_embedding() -> None:
    text = """g (int64[B] i, float[B,5,8] x)
        => (float[B,8] y, float[B,8] first, int64[B,8] n, float[50,B] column) {
      zero = Constant<value = int64 {0}>()
      y = Gather(table, i)
      first = Gather<axis=1>(x, zero)
      n = Gather(integers, i)
      column = Gather<axis=1>(table, i)
    }"""
    assert list(layers(model(text, "table 50 8", "integers 50 8 int64"))) == ["y"]


# The bias Add


@pytest.mark.parametrize("order", ["h, b", "b, h"])
@over(
    "x op w b y",
    """
    MatMul         | float[B,8,4]   | MatMul | w 4 8     | b 8       | float[B,8,8]
    MatMul, 3-D    | float[B,8,4]   | MatMul | w 4 8     | b 1 1 8   | float[B,8,8]
    Gemm           | float[B,4]     | Gemm   | w 4 8     | b 8       | float[B,8]
    Conv           | float[B,3,8,8] | Conv   | w 8 3 1 1 | b 1 8 1 1 | float[B,8,8,8]
    Conv, two axes | float[B,3,8]   | Conv   | w 8 3 1   | b 8 1     | float[B,8,8]
    """,
)
def test_the_bias_add_belongs_to_the_layer(
    x: str, op: str, w: str, b: str, y: str, order: str
) -> None:
    text = f"g ({x} x) => ({y} y) {{[core] h = {op}(x, w) [bias] y = Add({order})}}"
    made = model(text, w, b)
    (site,) = find_sites(made)
    assert (site.node, site.op, site.tensor, site.width) == ("core", op, "y", 8)
    assert sorted(every(made)) == ["h", "y"]


@over(
    "body",
    """
    Constant node     | b = Constant<value = float[4] {1, 2, 3, 4}>()
    Constant of floats | b = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
    Identity          | b = Identity(stored)
    Cast              | b = Cast<to=1>(half)
    DequantizeLinear  | b = DequantizeLinear(stored8, scale)
    """,
)
def test_the_bias_may_be_any_kind_of_constant(body: str) -> None:
    text = f"g (float[B,4] x) => (float[B,4] y) {{h = MatMul(x, w) {body} y = Add(h, b)}}"
    constants = ["w 4 4", "stored 4", "half 4 float16", "stored8 4 int8", "scale"]
    assert list(layers(model(text, *constants))) == ["y"]


def test_a_bias_is_found_behind_a_calibrated_range_of_the_product() -> None:
    text = """g (float[B,4] x) => (float[B,4] y) {
      h = MatMul(x, w)
      q = QuantizeLinear(h, scale, zero)
      d = DequantizeLinear(q, scale, zero)
      y = Add(b, d)
    }"""
    assert list(layers(model(text, "w 4 4", "scale", "zero uint8", "b 4"))) == ["y"]


@over(
    "body",
    """
    range that others read too | q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) \
                                 e = DequantizeLinear(q, s, z) a = Add(d, b) y = Add(a, e)
    product that is read too   | q = QuantizeLinear(h, s, z) d = DequantizeLinear(q, s, z) \
                                 a = Add(d, b) y = Add(a, h)
    """,
)
def test_an_add_behind_a_range_that_is_read_elsewhere_stays_outside_the_layer(
    body: str,
) -> None:
    text = f"g (float[B,4] x) => (float[B,4] y) {{h = MatMul(x, w) {body}}}"
    assert list(layers(model(text, "w 4 4", "s", "z uint8", "b 4"))) == ["h"]


@over(
    "body",
    """
    positional embedding | h = MatMul(x, w) y = Add(h, pos)
    residual             | h = MatMul(x, w) y = Add(h, x)
    doubling             | h = MatMul(x, w) y = Add(h, h)
    one number           | h = MatMul(x, w) y = Add(h, one)
    one number per row   | h = MatMul(x, w) y = Add(h, rows)
    two readers          | h = MatMul(x, w) s = Relu(h) a = Add(h, b) y = Mul(s, a)
    second bias          | h = Gemm(x, w, b) y = Add(h, b)
    multiplication       | h = MatMul(x, w) y = Mul(h, b)
    """,
)
def test_an_add_that_is_no_bias_stays_outside_the_layer(body: str) -> None:
    text = f"g (float[4,4] x) => (float[4,4] y) {{{body}}}"
    assert list(layers(model(text, "w 4 4", "pos 4 4", "one 1", "rows 4 1", "b 4"))) == ["h"]


def test_an_add_after_a_graph_output_is_no_bias() -> None:
    text = "g (float[B,4] x) => (float[B,4] h, float[B,4] y) {h = MatMul(x, w) y = Add(h, b)}"
    assert list(layers(model(text, "w 4 4", "b 4"))) == ["h"]


def test_an_add_is_no_bias_when_a_body_reads_the_layer_too() -> None:
    text = """g (float[4,4] x, bool c) => (float[4,4] y) {
      h = MatMul(x, w)
      a = Add(h, b)
      i = If(c) <then_branch = t () => (float[4,4] p) {p = Relu(h)},
                 else_branch = e () => (float[4,4] q) {q = Relu(x)}>
      y = Mul(a, i)
    }"""
    assert list(layers(model(text, "w 4 4", "b 4"))) == ["h"]


@pytest.mark.parametrize("bias", ["b 8", "b 1 1 8 1"])
def test_a_constant_along_the_picture_is_no_bias_of_a_conv(bias: str) -> None:
    text = "g (float[B,3,8,8] x) => (float[B,8,8,8] y) {h = Conv(x, w) y = Add(h, b)}"
    assert list(layers(model(text, "w 8 3 1 1", bias))) == ["h"]


# Widths and dtypes where shape inference is silent: it cannot look through com.microsoft


@over(
    "body",
    """
    Constant node             | w = Constant<value = float[2,3] {1, 2, 3, 4, 5, 6}>()
    Identity                  | w = Identity(k)
    Transpose                 | w = Transpose(t)
    Transpose with perm       | w = Transpose<perm=[1, 0]>(t)
    Cast                      | w = Cast<to=1>(half)
    Mul                       | w = Mul(k, scale)
    Mul, scale first          | w = Mul(scale, k)
    Mul, scales of rows first | w = Mul(rows, k)
    DequantizeLinear          | w = DequantizeLinear(quantized, scale)
    chain | p = DequantizeLinear(turned, scale) q = Transpose(p) w = Identity(q)
    """,
)
def test_the_width_is_the_weights_wherever_it_is_stored(body: str) -> None:
    text = f"""g (float[B,2] x) => (float[B,3] z) {{
      s = com.microsoft.Gelu(x) {body}
      h = MatMul(s, w)
      y = Add(h, b)
      z = com.microsoft.Gelu(y)
    }}"""
    floats = ["k 2 3", "t 3 2", "half 2 3 float16", "scale", "rows 2 1", "b 3"]
    site = layers(model(text, *floats, "quantized 2 3 int8", "turned 3 2 int8"))["y"]
    assert (site.op, site.width, site.dtype, site.refused) == ("MatMul", 3, "float32", None)


@over(
    "core stored width axis dtype",
    """
    transposed    | FusedMatMul<transB=1>(s, w)             | w 6 4         |  6 | -1 | float32
    fused Gemm    | FusedGemm<transB=1>(s, w)               | w 6 4         |  6 | -1 | float32
    fused Conv    | FusedConv(s, w)                         | w 6 3 1       |  6 |  1 | float32
    half Conv     | FusedConv(s, w)                         | w 6 3 1 float16 | 6 | 1 | float16
    norm          | SkipLayerNormalization(s, s, w)         | w 6           |  6 | -1 | float32
    half norm     | SkipLayerNormalization(s, s, w)         | w 6 float16   |  6 | -1 | float16
    simple norm   | SkipSimplifiedLayerNormalization(s, s, w) | w 6         |  6 | -1 | float32
    4 bits        | MatMulNBits<K=4, N=6, bits=4>(s, q, w)  | w 6           |  6 | -1 | float32
    4 bits, half  | MatMulNBits<K=4, N=6, bits=4>(s, q, w)  | w 6 float16   |  6 | -1 | float16
    dynamic       | DynamicQuantizeMatMul(s, q, w)          | w 6           |  6 | -1 | float32
    dynamic LSTM  | DynamicQuantizeLSTM<hidden_size=6>(s, q, q, w) | w 6    |  6 | -1 | float32
    rescaled      | MatMulIntegerToFloat(a, q, one, w)      | w 6           |  6 | -1 | float32
    """,
)
def test_the_width_and_dtype_of_a_fused_layer_are_its_weights(
    core: str, stored: str, width: str, axis: str, dtype: str
) -> None:
    text = f"""g (float[D] x, int8[D,4] a) => (float[E] z) {{
      s = local.Unknown(x)
      y = com.microsoft.{core}
      z = local.Unknown(y)
    }}"""
    site = layers(model(text, stored, "q 4 6 int8", "one"))["y"]
    assert (site.width, site.axis, site.dtype) == (int(width), int(axis), dtype)
    assert site.refused is None


@pytest.mark.parametrize("sizes", ["B,S", "2,10"])
def test_the_product_with_a_vector_has_no_features(sizes: str) -> None:
    text = f"g (float[{sizes},4] x) => (float[{sizes}] y) {{[dot] y = MatMul(x, w)}}"
    site = layers(model(text, "w 4"))["y"]
    assert (site.width, site.axis) == (None, None)
    assert site.refused == "MatMul 'dot' sums over the axis of its features"


def test_channels_of_a_tensor_with_unknown_axes_are_refused() -> None:
    text = """g (float[B,6,9] x) => (float[B,6,9] y) {
      s = local.Unknown(x)
      y0 = BatchNormalization(s, w, w, w, w)
      y = local.Unknown(y0)
    }"""
    assert "number of axes" in str(layers(model(text, "w 6"))["y0"].refused)


def test_an_initializer_that_is_an_input_too_is_still_a_weight() -> None:
    text = """g (float[B,4] x, float[4,6] w, float[6] b) => (float[B,6] y) {
      h = MatMul(x, w)
      y = Add(h, b)
    }"""
    made = model(text, "w 4 6", "b 6", opset=9, ir=3)
    assert [(s.tensor, s.width) for s in find_sites(made)] == [("y", 6)]
    assert sorted(every(made)) == ["h", "y"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "double"])
def test_a_layer_and_what_follows_it_have_the_dtype_of_its_weight(dtype: str) -> None:
    text = f"""g ({dtype}[D] x) => ({dtype}[E] z) {{
      s = com.microsoft.Gelu(x)
      h = MatMul(s, w)
      y = Relu(h)
      z = com.microsoft.Gelu(y)
    }}"""
    made = every(model(text, f"w 4 6 {dtype}"))
    name = dtype.replace("double", "float64")
    assert (made["h"].width, made["h"].dtype, made["h"].refused) == (6, name, None)
    assert made["y"].dtype == name


def test_a_long_chain_of_scalings_is_surveyed() -> None:
    steps = "\n".join(f"t{i + 1} = Mul(t{i}, k)" for i in range(3000))
    text = f"g (float[B,6] t0) => (float[B,6] t3000) {{{steps}}}"
    assert len(every(model(text, "k 6"))) == 3000


def test_squaring_a_constant_again_and_again_takes_no_time() -> None:
    steps = "\n".join(f"t{i + 1} = Mul(t{i}, t{i})" for i in range(24))
    text = f"g (float[B,6] x) => (float[B,6] y) {{{steps} y = Add(x, t24)}}"
    begun = time.process_time()
    assert every(model(text, "t0 6"))["y"].refused is None
    assert time.process_time() - begun < 5


# Axis 1 for Conv and what follows


@over(
    "body",
    """
    activation            | y = Relu(h)
    pooling               | y = MaxPool<kernel_shape=[1, 1]>(h)
    residual              | y = Add(h, h)
    quantisation          | q = QuantizeLinear(h, one) y = DequantizeLinear(q, one)
    global pooling        | y = GlobalAveragePool(h)
    mean of each channel  | y = ReduceMean<axes=[2, 3], keepdims=1>(h)
    half of the channels  | y, z = Split<axis=1>(h)
    concatenation         | y = Concat<axis=1>(h, h)
    choice                | n = Greater(h, one) y = Where(n, h, one)
    maximum               | y = Max(h, one)
    softmax over channels | y = Softmax<axis=1>(h)
    pixel shuffle         | y = DepthToSpace<blocksize=2>(h)
    """,
)
def test_what_keeps_the_layout_of_a_conv_has_its_features_on_axis_1(body: str) -> None:
    text = f"""g (float[B,3,9,5] x) => (float[B,C,H,W] out) {{
      h = Conv(x, w) {body}
      out = com.microsoft.Gelu(y)
    }}"""
    made = every(model(text, "w 8 3 1 1", "one"))
    assert made["h"].axis == 1
    assert made["y"].axis == 1


def test_what_follows_a_normalisation_of_pictures_has_its_features_on_axis_1() -> None:
    text = """g (float[B,6,9,5] x) => (float[B,6,9,5] y) {
      h = BatchNormalization(x, w, w, w, w)
      y = Relu(h)
    }"""
    made = every(model(text, "w 6"))
    assert [(made[t].axis, made[t].width) for t in "hy"] == [(1, 6), (1, 6)]


def test_a_body_that_reads_a_conv_outside_has_its_features_on_axis_1() -> None:
    text = """g (float[B,3,9] x, bool c) => (float[B,6,9] y) {
      h = Conv(x, w)
      y = If(c) <then_branch = t () => (float[B,6,9] p) {p = Relu(h)},
                 else_branch = e () => (float[B,6,9] q) {q = Sigmoid(h)}>
    }"""
    made = every(model(text, "w 6 3 1"))
    assert [(made[t].axis, made[t].width) for t in "hpqy"] == [(1, 6)] * 4


@pytest.mark.parametrize("body", ["f = Flatten(h)", "f = Reshape(h, shape)"])
def test_flattened_features_are_on_the_last_axis(body: str) -> None:
    text = f"""g (float[2,3,5] x) => (float[2,7] y) {{
      shape = Constant<value = int64[2] {{2, 30}}>()
      h = Conv(x, w) {body} y = MatMul(f, v)
    }}"""
    made = every(model(text, "w 6 3 1", "v 30 7"))
    assert [(made[t].axis, made[t].width) for t in "hfy"] == [(1, 6), (-1, 30), (-1, 7)]


# Quantised models


@over(
    "body w better",
    """
    rescaled   | h = MatMulInteger(q, w, z) f = Cast<to=1>(h) y = Mul(f, s) | int8  | y
    only cast  | h = MatMulInteger(q, w, z) f = Cast<to=1>(h) y = Relu(f)   | int8  | f
    QLinear    | {qlinear} f = DequantizeLinear(h, s, z) y = Relu(f)        | uint8 | f
    with shape | {qlinear} n = Shape(h) y = DequantizeLinear(h, s, z)       | uint8 | y
    """,
)
def test_an_integer_layer_is_refused_and_names_the_float_tensor(
    body: str, w: str, better: str
) -> None:
    core = body.format(qlinear="h = QLinearMatMul(q, s, z, w, s, z, s, z)")
    text = f"g (float[B,4] x) => (float[B,6] y) {{q, s, z = DynamicQuantizeLinear(x) {core}}}"
    made = model(text, f"w 4 6 {w}")
    (site,) = find_sites(made)
    assert (site.tensor, site.width) == ("h", 6)
    assert f"the float tensor downstream is {better!r}" in str(site.refused)
    site = every(made)[better]
    assert (site.width, site.dtype, site.refused) == (6, "float32", None)


def test_a_quantised_conv_has_its_features_on_axis_1_up_to_the_float_tensor() -> None:
    text = """g (float[B,3,9,5] x) => (float[B,6,9,5] y) {
      q, s, z = DynamicQuantizeLinear(x)
      h = ConvInteger(q, w, z)
      f = Cast<to=1>(h)
      y = Mul(f, s)
    }"""
    made = every(model(text, "w 6 3 1 1 uint8"))
    assert "'y'" in str(made["h"].refused)
    assert [(made[t].axis, made[t].width) for t in "hfy"] == [(1, 6)] * 3


def test_an_integer_layer_with_nothing_float_behind_it_is_refused_without_advice() -> None:
    text = "g (int8[B,4] x) => (int32[B,6] y) {y = MatMulInteger(x, w)}"
    assert (
        layers(model(text, "w 4 6 int8"))["y"].refused == "its elements are int32, not floats"
    )


def test_a_statically_quantised_layer_is_a_float_layer_with_its_bias() -> None:
    text = """g (float[B,4] x) => (float[B,6] y) {
      q = QuantizeLinear(x, one)
      d = DequantizeLinear(q, one)
      v = DequantizeLinear<axis=1>(w, scales)
      h = MatMul(d, v)
      c = DequantizeLinear(b, one)
      a = Add(h, c)
      r = QuantizeLinear(a, one)
      y = DequantizeLinear(r, one)
    }"""
    made = model(text, "one", "w 4 6 int8", "scales 6", "b 6 int32")
    assert [(s.tensor, s.op, s.width) for s in find_sites(made)] == [("a", "MatMul", 6)]


def test_channels_in_blocks_are_no_place_for_an_adapter() -> None:
    made = model(
        "g (float[B,8,9,9] x) => (float[B,8,9,9] y) {h = Conv(x, w) y = Relu(h)}", "w 8 8 1 1"
    )
    made.proto.graph.node[0].domain = "com.microsoft.nchwc"
    made.proto.opset_import.add(domain="com.microsoft.nchwc", version=1)
    assert find_sites(made) == []
    assert "in blocks" in str(every(made)["h"].refused)
