"""Rules for matrix products."""

from __future__ import annotations

from onnx_adapt.graph.gradients.rule import Grads, Rule, Step
from onnx_adapt.graph.gradients.tape import INT64, Tape

# y = x @ w gives dx = dy @ w.T and dw = x.T @ dy. Of stacks of matrices both are stacks too,
# which are summed over the axes along which an operand was repeated. Where w is one matrix for
# a whole stack, dw is one product over all positions: `(positions, in).T @ (positions, out)`.


def matmul(tape: Tape, step: Step) -> Grads:
    """`x @ y`, of vectors, matrices or stacks of matrices."""
    x, y = step.input(0), step.input(1)
    if tape.rank(x) > 1 and tape.rank(y) > 1:
        return product_grads(tape, step, x, y, step.grad)
    return _vector_product(tape, step, x, y)


def product_grads(tape: Tape, step: Step, x: str, y: str, grad: str) -> Grads:
    """The gradients of a product of two matrices or stacks, `(..., m, k) @ (..., k, n)`."""
    grads: list[str | None] = [None, None]
    if step.wants(0):
        made = tape.add("MatMul", grad, tape.swapped(y, tape.rank(y)))
        single = tape.rank(y) == 2
        grads[0] = made if single else tape.unbroadcast(made, x, step.output, matrix=True)
    if step.wants(1) and tape.rank(y) == 2:
        rows, columns = (
            tape.add("Reshape", t, _matrix(tape, of))
            for t, of in ((x, x), (grad, step.output))
        )
        grads[1] = tape.add("MatMul", tape.permuted(rows, (1, 0)), columns)
    elif step.wants(1):
        made = tape.add("MatMul", tape.swapped(x, tape.rank(x)), grad)
        grads[1] = tape.unbroadcast(made, y, step.output, matrix=True)
    return grads


def _matrix(tape: Tape, tensor: str) -> str:
    """The shape `(positions, width)` of a tensor; positions may be none."""
    width = tape.size(tensor, -1)
    positions = tape.add("Div", tape.once("Size", tensor, elem_type=INT64), width)
    return tape.joined(tape.add("Reshape", positions, tape.integers(1)), width)


def _vector_product(tape: Tape, step: Step, x: str, y: str) -> Grads:
    """A product with a vector: it is a matrix with one row or one column."""
    rank, other = tape.rank(x), tape.rank(y)
    grad = step.grad
    grads: list[str | None] = [None, None]
    if rank == other == 1:
        return [
            tape.add("Mul", grad, t) if w else None
            for t, w in zip((y, x), step.wanted, strict=True)
        ]
    if other == 1:  # (..., k) @ (k,) -> (...)
        column = tape.unsqueezed(grad, -1)
        if step.wants(0):
            grads[0] = tape.add("Mul", column, y)
        if step.wants(1):
            grads[1] = tape.total(tape.add("Mul", column, x), range(rank - 1), keep=False)
        return grads
    row = tape.unsqueezed(grad, -2)  # (k,) @ (..., k, n) -> (..., n)
    if step.wants(0):
        products = tape.add("MatMul", row, tape.swapped(y, other))
        grads[0] = tape.total(tape.squeezed(products, -2), range(other - 2), keep=False)
    if step.wants(1):
        grads[1] = tape.add("Mul", tape.unsqueezed(x, -1), row)
    return grads


def gemm(tape: Tape, step: Step) -> Grads:
    """`alpha * x @ y + beta * c`, with x and y transposed or not."""
    x, y, c = (step.input(i) for i in range(3))
    alpha, beta = step.attribute("alpha", 1.0), step.attribute("beta", 1.0)
    flip_x, flip_y = bool(step.attribute("transA", 0)), bool(step.attribute("transB", 0))
    grads: list[str | None] = [None, None, None]
    if step.wants(0):
        pair, turned = (
            ((y, step.grad), (flip_y, True))
            if flip_x
            else ((step.grad, y), (False, not flip_y))
        )
        grads[0] = _gemm(tape, pair, turned, alpha)
    if step.wants(1):
        pair, turned = (
            ((step.grad, x), (True, flip_x))
            if flip_y
            else ((x, step.grad), (not flip_x, False))
        )
        grads[1] = _gemm(tape, pair, turned, alpha)
    if step.wants(2):
        grads[2] = tape.unbroadcast(tape.times(step.grad, beta), c, step.output)
    return grads


def _gemm(tape: Tape, pair: tuple[str, str], turned: tuple[bool, bool], alpha: float) -> str:
    first, second = (int(flag) for flag in turned)
    return tape.add("Gemm", *pair, alpha=alpha, transA=first, transB=second)


def einsum(tape: Tape, step: Step) -> Grads:
    """Einsum: the gradient of an operand is an Einsum of the others with the gradient.

    For example `bij,bjk->bik` has `bik,bjk->bij` for its first operand. An index that only one
    operand has was summed over, so its gradient is repeated along it.
    """
    equation = step.attribute("equation", "").replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "->" not in equation or "." in equation or any(len({*t}) < len(t) for t in terms):
        raise step.refuse(f"its equation {equation!r} has no output, '...' or a diagonal")
    grads: list[str | None] = []
    for i, wanted in enumerate(step.wanted):
        if not wanted:
            grads.append(None)
            continue
        others = [(t, step.input(k)) for k, t in enumerate(terms) if k != i]
        around = {*right}.union(*(t for t, _ in others))
        kept = "".join(index for index in terms[i] if index in around)
        spelled = ",".join([right, *(t for t, _ in others)])
        made = tape.add(
            "Einsum", step.grad, *(n for _, n in others), equation=f"{spelled}->{kept}"
        )
        missing = [k for k, index in enumerate(terms[i]) if index not in around]
        if missing:
            made = tape.add(
                "Expand", tape.unsqueezed(made, *missing), tape.shape_of(step.input(i))
            )
        grads.append(made)
    return grads


PRODUCTS: dict[str, Rule] = {
    "MatMul": matmul,
    "Gemm": gemm,
    "Einsum": einsum,
}
"""The rules by operator."""
