"""Slots that look at more than one position, against convolutions in plain numpy."""

from dataclasses import replace

import numpy as np
import pytest
from slot_formula import PLAIN, SOURCE_WIDTH, WIDTH, run_nodes

from onnx_adapt.slot.checks import check_slot
from onnx_adapt.slot.oracle import slot_value

KERNEL, STRIDES, BEGINS, ENDS, DILATIONS = (
    (3, 2, 1),
    (2, 1, 1),
    (1, 0, 1),
    (0, 1, 1),
    (2, 3, 1),
)


def _convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`(batch, channels, space...)` by the window above: one term for each of its places."""
    n = x.ndim - 2
    x = np.pad(x, [(0, 0), (0, 0), *zip(BEGINS[:n], ENDS[:n], strict=True)])
    spans = [(k - 1) * d + 1 for k, d in zip(KERNEL[:n], DILATIONS[:n], strict=True)]
    sizes = [
        (size - span) // step + 1
        for size, span, step in zip(x.shape[2:], spans, STRIDES[:n], strict=True)
    ]
    total = 0
    for place in np.ndindex(*KERNEL[:n]):
        starts = [i * d for i, d in zip(place, DILATIONS[:n], strict=True)]
        cut = tuple(
            slice(start, start + (size - 1) * step + 1, step)
            for start, size, step in zip(starts, sizes, STRIDES[:n], strict=True)
        )
        total = total + np.einsum("bi...,ri->br...", x[(..., *cut)], weight[(..., *place)])
    return total


@pytest.mark.parametrize("opset", [7, 11, 22])
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_a_slot_with_a_window_is_a_convolution_of_its_source(rank: int, opset: int) -> None:
    n = rank - 2
    parts = (KERNEL, STRIDES, BEGINS, ENDS, DILATIONS)
    slot = replace(
        PLAIN,
        axis=1,
        rank=rank,
        source="x",
        source_width=SOURCE_WIDTH,
        window=tuple(number for part in parts for number in part[:n]),
    )
    check_slot(slot, opset)
    rng = np.random.default_rng(rank)
    x = rng.standard_normal((2, SOURCE_WIDTH, *(11, 7, 4)[:n]))
    down = rng.standard_normal((3, SOURCE_WIDTH, *KERNEL[:n]))
    up = rng.standard_normal((WIDTH, 3, *(1,) * n))
    hidden = np.maximum(_convolved(x, down), 0)
    term = np.einsum("br...,wr->bw...", hidden, up.reshape(WIDTH, 3))
    t = rng.standard_normal(term.shape)
    given = {"t": t, "x": x, slot.weight("down"): down, slot.weight("up"): up}
    got = run_nodes(slot, opset, {k: v.astype(np.float32) for k, v in given.items()})
    np.testing.assert_allclose(got, t + term, 1e-4, 1e-4)
    oracle = slot_value(slot, t, x, {"down": down, "up": up})
    np.testing.assert_allclose(oracle, t + term, 1e-12, 1e-12)
