"""One step of LSTM, GRU and RNN as a graph, in the words of ONNX's own definitions.

Each reads `a`, what the input of the step gives (`x @ w.T + bias`), and the state before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import parser

from onnx_adapt.errors import GradientError
from onnx_adapt.graph.gradients.rule import Step
from onnx_adapt.graph.index import elem_name

_ACTIVATIONS = ("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")
"""The activations without settings of their own."""

_NAMES = {"float32": "float", "float64": "double", "float16": "float16"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One step of a recurrent operator.

    Attributes:
        graph: Its graph: `a`, states and parameters to the next states.
        states: The names of the states: `h`, and `c` of an LSTM.
        params: The names of the parameters: `r`, and `rb` of a GRU.
        gates: How many gates there are.
    """

    graph: onnx.GraphProto
    states: tuple[str, ...]
    params: tuple[str, ...]
    gates: int


def cell_of(step: Step, direction: int, elem_type: int) -> Cell:
    """The cell of one direction of a recurrent node.

    Raises:
        GradientError: If the node has settings that no cell here has.
    """
    op, size = step.node.op_type, step.attribute("hidden_size", 0)
    for name in ("clip", "layout", "input_forget", "activation_alpha", "activation_beta"):
        if step.attribute(name, None):
            raise step.refuse(f"it has the setting {name}")
    if op == "LSTM" and step.input(7):
        raise step.refuse("it has peepholes")
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    kind = _NAMES.get(elem_name(elem_type))
    if not kind or not size:
        raise step.refuse("its element type or hidden_size is not known")
    text = _TEXTS[op if op != "GRU" else f"GRU{step.attribute('linear_before_reset', 0)}"]
    f, g, h = _activations(step, direction)
    sizes = ", ".join([str(size)] * gates)
    spelled = text.format(
        state=f"{kind}[batch, {size}]",
        all=f"{kind}[batch, {gates * size}]",
        matrix=f"{kind}[{gates * size}, {size}]",
        bias=f"{kind}[{gates * size}]",
        number=kind,
        sizes=f"Constant <value_ints = [{sizes}]> ()",
        f=f,
        g=g,
        h=h,
    )
    states = ("h", "c") if op == "LSTM" else ("h",)
    params = ("r", "rb") if op == "GRU" else ("r",)
    return Cell(parser.parse_graph(spelled), states, params, gates)


def _activations(step: Step, direction: int) -> tuple[str, str, str]:
    """The activations of a direction: of the gates, of the new state, of an LSTM's output."""
    own = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
    default = own[step.node.op_type]
    given = [item.decode() for item in step.attribute("activations", None) or ()]
    count = len(default)
    chosen = given[direction * count : (direction + 1) * count] or list(default)
    known = {name.lower(): name for name in _ACTIVATIONS}
    if len(chosen) != count or any(name.lower() not in known for name in chosen):
        raise _unknown(step, chosen)
    found = [known[name.lower()] for name in chosen]
    f, g, h = (*found, *[found[0]] * (3 - count))
    return f, g, h


def _unknown(step: Step, chosen: list[str]) -> GradientError:
    return step.refuse(f"its activations are {', '.join(chosen)}")


_LSTM = """cell ({all} a, {state} h, {state} c, {matrix} r)
=> ({state} h_next, {state} c_next) {{
    turned = Transpose <perm = [1, 0]> (r)
    before = MatMul (h, turned)
    gates = Add (a, before)
    sizes = {sizes}
    i0, o0, f0, g0 = Split <axis = 1> (gates, sizes)
    i = {f} (i0)
    o = {f} (o0)
    f = {f} (f0)
    g = {g} (g0)
    kept = Mul (f, c)
    new = Mul (i, g)
    c_next = Add (kept, new)
    shown = {h} (c_next)
    h_next = Mul (o, shown)
}}"""

_GRU_BEGIN = """cell ({all} a, {state} h, {matrix} r, {bias} rb) => ({state} h_next) {{
    sizes = {sizes}
    az, ar, an = Split <axis = 1> (a, sizes)
    rz, rr, rn = Split <axis = 0> (r, sizes)
    bz, br, bn = Split <axis = 0> (rb, sizes)
    tz = Transpose <perm = [1, 0]> (rz)
    hz = MatMul (h, tz)
    z1 = Add (az, hz)
    z0 = Add (z1, bz)
    z = {f} (z0)
    tr = Transpose <perm = [1, 0]> (rr)
    hr = MatMul (h, tr)
    q1 = Add (ar, hr)
    q0 = Add (q1, br)
    q = {f} (q0)
    tn = Transpose <perm = [1, 0]> (rn)
"""

_GRU_END = """
    n0 = Add (an, hn)
    n = {g} (n0)
    one = Constant <value = {number} {{1}}> ()
    rest = Sub (one, z)
    new = Mul (rest, n)
    kept = Mul (z, h)
    h_next = Add (new, kept)
}}"""

_TEXTS = {
    "LSTM": _LSTM,
    "GRU0": _GRU_BEGIN
    + """
    reset = Mul (q, h)
    h1 = MatMul (reset, tn)
    hn = Add (h1, bn)
"""
    + _GRU_END,
    "GRU1": _GRU_BEGIN
    + """
    h1 = MatMul (h, tn)
    h2 = Add (h1, bn)
    hn = Mul (q, h2)
"""
    + _GRU_END,
    "RNN": """cell ({all} a, {state} h, {matrix} r) => ({state} h_next) {{
    turned = Transpose <perm = [1, 0]> (r)
    before = MatMul (h, turned)
    h0 = Add (a, before)
    h_next = {f} (h0)
}}""",
}
"""The cells; `f`, `g` and `h` in braces are activations, as ONNX calls them."""
