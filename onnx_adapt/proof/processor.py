"""Whether ONNX Runtime computes with 8-bit integers as the model says, on this processor.

With AVX2 and without VNNI it adds two products of an unsigned and a signed byte in 16 bits,
and such a sum saturates: 255 * 127 + 255 * 127 becomes 32767. The outputs of a quantised model
may be far off then, with an adapter and without. Proofs tell ONNX Runtime to be exact
(`ort.start_exactly`); other sessions are not, since it may take them twice the time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from onnx import parser

from onnx_adapt.model import walk
from onnx_adapt.model.file import Model
from onnx_adapt.ort import CPU, EXACT_PRODUCTS, Providers
from onnx_adapt.proof.compare import distance
from onnx_adapt.proof.feeds import Feeds
from onnx_adapt.proof.runner import Runner, Values

_OPERATORS = {
    *("MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "ConvInteger"),
    *("QLinearMatMul", "QLinearConv", "QGemm", "QAttention", "DequantizeLinear"),
}
"""What computes with 8-bit integers, or becomes what does when ONNX Runtime fuses nodes."""

_FAR = 0.05
"""How far outputs must move to be worth a warning; fusing alone rounds by about 0.01."""

_SUM = """<ir_version: 8, opset_import: ["": 13]>
g (uint8[1, 2] a) => (int32[1, 1] y) <int8[2, 1] b = {127, 127}> { y = MatMulInteger(a, b) }
"""


@functools.cache
def saturates() -> bool:
    """Whether sums of 8-bit products saturate in ONNX Runtime on this processor."""
    model = Model(parser.parse_model(_SUM))
    runner = Runner(model, CPU, optimised=True, exact=False)
    return bool(runner.run({"a": np.full((1, 2), 255, np.uint8)})["y"][0, 0] != 2 * 255 * 127)


def processor_warning(
    base: Model,
    feeds: Sequence[Feeds],
    exact: Sequence[Values] | None,
    providers: Providers,
) -> tuple[str, ...]:
    """Say how far the outputs of a base are off in a session of ONNX Runtime's own settings.

    Args:
        base: The base.
        feeds: Inputs.
        exact: Its outputs for them in a session that is exact; None if there is none.
        providers: Where it runs.

    Returns:
        One warning, or none.
    """
    graphs = (scope.graph for scope in walk.scopes(base.proto.graph))
    operators = {node.op_type for graph in graphs for node in graph.node}
    if providers != CPU or not operators & _OPERATORS or not saturates():
        return ()
    if exact is None:
        return (
            "sums of 8-bit products saturate in ONNX Runtime on this processor, and it cannot "
            "load the base so that they do not: the outputs may be far off, with an adapter "
            "and without",
        )
    runner = Runner(base, providers, optimised=True, exact=False)
    moved = distance(exact, [runner.run(each, list(exact[0])) for each in feeds])
    if moved < _FAR:
        return ()
    return (
        "sums of 8-bit products saturate in ONNX Runtime on this processor, which moves the "
        f"outputs of the base by {moved:.0%}, with an adapter and without; the session option "
        f"{EXACT_PRODUCTS}=1 makes them exact",
    )
