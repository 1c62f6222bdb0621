"""The pieces of random models: what exporters write for layers, norms and layouts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from layout_models import NOWHERE, Features, Network

Piece = Callable[[Network], object]


def _conv(net: Network) -> None:
    """A 3 x 3 convolution with a bias inside, then what needs no layout to be known."""
    c = net.shape[1]
    net.channels("Conv", net.at, net.weight(8, c, 3, 3), net.weight(8), pads=[1] * 4)
    net.channels("Relu", net.at)


def _pointwise(net: Network) -> None:
    """A 1 x 1 convolution, and its bias as an Add."""
    c = net.shape[1]
    raw = net.channels("Conv", net.at, net.weight(6, c, 1, 1))
    out = net.channels("Add", raw, net.weight(1, 6, 1, 1))
    net.features[raw] = Features(1, 6, biased=out)


def _batch_norm(net: Network) -> None:
    c = net.shape[1]
    parts = [net.weight(c, around=1), net.weight(c), net.weight(c), net.weight(c, around=1)]
    net.channels("BatchNormalization", net.at, *parts)


def _pool(net: Network) -> None:
    net.channels("Tanh", net.at)
    net.channels("MaxPool", net.at, kernel_shape=[3, 3], pads=[1] * 4)


def _residual(net: Network) -> None:
    before = net.at
    c = net.shape[1]
    net.channels("Conv", net.at, net.weight(c, c, 1, 1))
    net.channels("Add", net.at, before)


def _group_norm(net: Network) -> None:
    """GroupNorm with two groups as torch.onnx writes it before opset 18."""
    c, sizes = net.shape[1], net.put("Shape", net.at)
    pair = net.constant([0, 2, -1])
    x = next(i for i in net.nodes[-1].input)
    net.put("Reshape", x, pair, features=NOWHERE)
    ones, zeros = net.constant(np.ones(2)), net.constant(np.zeros(2))
    net.put("InstanceNormalization", net.at, ones, zeros, features=NOWHERE)
    net.channels("Reshape", net.at, sizes)
    net.channels("Mul", net.at, net.weight(c, 1, 1, around=1))
    net.channels("Add", net.at, net.weight(c, 1, 1))


def _shuffle(net: Network) -> None:
    """ShuffleNet's channel shuffle, its sizes as constants."""
    _, c, *sizes = net.shape
    net.put("Reshape", net.at, net.constant([-1, 2, c // 2, *sizes]), features=NOWHERE)
    net.put("Transpose", net.at, perm=[0, 2, 1, 3, 4], features=NOWHERE)
    net.channels("Reshape", net.at, net.constant([-1, c, *sizes]))


def _shuffle_of_any_size(net: Network) -> None:
    """The same with the sizes read from the tensor, as a traced model has them."""
    c, x = net.shape[1], net.at
    shape = net.put("Shape", x)
    rows, pixels = (net.put("Gather", shape, net.constant(i), axis=0) for i in ([0], [2, 3]))
    split = net.put("Concat", rows, net.constant([2, c // 2]), pixels, axis=0)
    whole = net.put("Concat", rows, net.constant([c]), pixels, axis=0)
    net.put("Reshape", x, split, features=NOWHERE)
    net.put("Transpose", net.at, perm=[0, 2, 1, 3, 4], features=NOWHERE)
    net.channels("Reshape", net.at, whole)


def _nhwc(net: Network) -> None:
    """NHWC and back around a Linear and a LayerNorm, as ConvNeXt has them."""
    c = net.shape[1]
    net.last("Transpose", net.at, perm=[0, 2, 3, 1])
    net.last("LayerNormalization", net.at, net.weight(c, around=1), net.weight(c), axis=-1)
    raw = net.last("MatMul", net.at, net.weight(c, 4))
    out = net.last("Add", raw, net.weight(4))
    net.features[raw] = Features(3, 4, biased=out)
    net.last("Tanh", net.at)
    net.channels("Transpose", net.at, perm=[0, 3, 1, 2])


def _nhwc_plain(net: Network) -> None:
    """NHWC and back around an operator that knows no layout, as TensorFlow's have it."""
    net.last("Transpose", net.at, perm=[0, 2, 3, 1])
    net.last("Tanh", net.at)
    net.channels("Transpose", net.at, perm=[0, 3, 1, 2])


def _squeeze_excite(net: Network) -> None:
    x, c = net.at, net.shape[1]
    net.channels("GlobalAveragePool", net.at)
    net.channels("Conv", net.at, net.weight(c, c, 1, 1), net.weight(c))
    net.channels("Sigmoid", net.at)
    net.channels("Mul", x, net.at)


def _flat_image(net: Network) -> None:
    """A convolution, then every channel of every pixel in one row, for a Linear."""
    _pointwise(net)
    net.put("Flatten", net.at, axis=1)
    net.last("MatMul", net.at, net.weight(net.shape[-1], 4))


def _patches(net: Network) -> None:
    """Pixels to tokens, as a vision transformer has them: `(n, c, p)`, then `(n, p, c)`."""
    c = net.shape[1]
    net.channels("Reshape", net.at, net.constant([0, c, -1]))
    net.last("Transpose", net.at, perm=[0, 2, 1])
    net.last("LayerNormalization", net.at, net.weight(c, around=1), net.weight(c), axis=-1)
    net.last("MatMul", net.at, net.weight(c, 4))


def _pooled_head(net: Network) -> None:
    c = net.shape[1]
    net.channels("GlobalAveragePool", net.at)
    net.channels("Flatten", net.at, axis=1)
    net.last("MatMul", net.at, net.weight(c, 3))


PICTURE: dict[str, Piece] = {
    piece.__name__.lstrip("_"): piece
    for piece in (
        *(_conv, _pointwise, _batch_norm, _pool, _residual, _group_norm, _shuffle),
        *(_shuffle_of_any_size, _nhwc, _nhwc_plain, _squeeze_excite),
    )
}
"""From `(n, c, h, w)` to the same."""

PICTURE_ENDS: dict[str, Piece] = {
    "flat_image": _flat_image,
    "patches": _patches,
    "pooled_head": _pooled_head,
}


def _dense(net: Network) -> None:
    d = net.shape[-1]
    raw = net.last("MatMul", net.at, net.weight(d, d), name=_scoped(net, "MatMul"))
    out = net.last("Add", raw, net.weight(d), name=_scoped(net, "Add", raw))
    net.features[raw] = Features(len(net.shape) - 1, d, biased=out)
    net.last("Tanh", net.at)


def _scoped(net: Network, op: str, of: str = "") -> str:
    """A node's name with the path of its PyTorch module in it: `/t3/dense/MatMul`."""
    return f"/{of or f't{len(net.nodes)}'}/dense/{op}"


def _norm(net: Network) -> None:
    before, d = net.at, net.shape[-1]
    net.last("Tanh", net.at)
    net.last("Add", net.at, before)
    net.last("LayerNormalization", net.at, net.weight(d, around=1), net.weight(d), axis=-1)


def _bias_gelu(net: Network) -> None:
    d = net.shape[-1]
    raw = net.last("MatMul", net.at, net.weight(d, d), name=_scoped(net, "MatMul"))
    net.last("BiasGelu", net.at, net.weight(d))
    net.features[raw] = Features(len(net.shape) - 1, d, biased="inside")


def _fast_gelu(net: Network) -> None:
    d = net.shape[-1]
    raw = net.last("MatMul", net.at, net.weight(d, d), name=_scoped(net, "MatMul"))
    net.last("FastGelu", net.at, net.weight(d))
    net.features[raw] = Features(len(net.shape) - 1, d, biased="inside")


def _skip_norm(net: Network) -> None:
    """`LayerNorm(MatMul + skip + bias)`: the bias is the fifth input."""
    before, d = net.at, net.shape[-1]
    raw = net.last("MatMul", net.at, net.weight(d, d), name=_scoped(net, "MatMul"))
    parts = [net.weight(d, around=1), net.weight(d), net.weight(d)]
    net.last("SkipLayerNormalization", raw, before, *parts, epsilon=1e-5)
    net.features[raw] = Features(len(net.shape) - 1, d, biased="inside")


def _token_conv(net: Network) -> None:
    """A convolution over the tokens, between two Transposes."""
    d = net.shape[-1]
    net.channels("Transpose", net.at, perm=[0, 2, 1])
    net.channels("Conv", net.at, net.weight(d, d, 3), net.weight(d), pads=[1, 1])
    net.channels("Tanh", net.at)
    net.last("Transpose", net.at, perm=[0, 2, 1])


def _scores(net: Network) -> None:
    """One number for each token, as an output of its own: `x @ w` with a vector."""
    x = net.at
    out = net.put("MatMul", x, net.weight(net.shape[-1]), features=NOWHERE)
    net.outputs.append(out)
    net.last("Tanh", x)


TOKENS: dict[str, Piece] = {
    piece.__name__.lstrip("_"): piece
    for piece in (_dense, _norm, _bias_gelu, _fast_gelu, _skip_norm, _token_conv, _scores)
}
"""From `(n, t, d)` to the same."""


def picture_network(
    pieces: list[str], end: str = "", side: int = 8, free: bool = False
) -> Network:
    """A network of 8 channels and `side` x 4 pixels; `free` makes both sizes symbols."""
    x = np.random.default_rng(5).standard_normal((3, 3, 4, side))
    net = Network(x, {0: "n", 2: "h", 3: "w"} if free else {0: "n"})
    _conv(net)
    for piece in pieces:
        PICTURE[piece](net)
    if end:
        PICTURE_ENDS[end](net)
    else:
        net.channels("Conv", net.at, net.weight(2, net.shape[1], 1, 1))
    return net


def token_network(pieces: list[str], length: int = 8, free: bool = False) -> Network:
    """A network of 8 features and `length` tokens; `free` makes the length a symbol."""
    x = np.random.default_rng(6).standard_normal((3, length, 8))
    net = Network(x, {0: "n", 1: "t"} if free else {0: "n"})
    for piece in pieces:
        TOKENS[piece](net)
    net.last("MatMul", net.at, net.weight(8, 5), name=_scoped(net, "MatMul"))
    return net


FUSED = ("bias_gelu", "fast_gelu", "skip_norm")
"""Pieces whose Linear has its bias inside the next operator."""
