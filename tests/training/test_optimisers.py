"""Optimisers, averages and schedules agree with PyTorch's, step by step."""

import numpy as np
import pytest

from onnx_adapt.dtypes import Array
from onnx_adapt.training.data import Batch
from onnx_adapt.training.engine import Result
from onnx_adapt.training.fit import take_step
from onnx_adapt.training.optimisers import Optimiser, rate_at
from onnx_adapt.training.progress import Progress
from onnx_adapt.training.settings import Settings

WEIGHTS = {"w": np.array([[0.5, -1.0], [2.0, 0.25]]), "b": np.array([0.1, -0.2])}
GRADS = {"w": np.array([[0.3, -0.2], [0.1, 0.4]]), "b": np.array([0.5, -0.6])}
FACTORS = (1.0, -0.5, 2.0)

TORCH: dict[str, tuple[Optimiser, float, list[list[list[float]]]]] = {
    # torch 2.13: torch.optim, three steps in float64; the weights, the biases as one row, and
    # the weights averaged by torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    "adamw": (
        Optimiser("adamw", decay=0.1, clip=0),
        0.01,
        [
            [[0.4792796670818985, -0.9777811668872236], [1.974784166803199, 0.23002891717924]],
            [[0.08075551396770898, -0.1807555139065661]],
            [[0.4881942086825737, -0.98754940381815], [1.9862597942748603, 0.238516611114788]],
        ],
    ),
    "adamw with a clip": (
        Optimiser("adamw", decay=0.1, clip=0.5),
        0.01,
        [
            [
                [0.4852469318852041, -0.9837484318081974],
                [1.980751432077177, 0.235996181923707],
            ],
            [[0.08672573255829158, -0.18672573247356766]],
            [[0.489056784724888, -0.988411980002499], [1.9871223708852954, 0.23937918708608]],
        ],
    ),
    "sgd with a clip": (
        Optimiser("sgd", clip=0.5),
        0.1,
        [
            [
                [0.4835514796235956, -0.9890343197490636],
                [1.994517159874532, 0.228068639498127],
            ],
            [[0.0725857993726593, -0.16710295924719118]],
            [[0.485553317501763, -0.990368878334509], [1.9951844391672542, 0.23073775666902]],
        ],
    ),
    "momentum": (
        Optimiser("momentum", clip=0),
        0.1,
        [
            [[0.3872, -0.9248], [1.9624, 0.0996]],
            [[-0.088, 0.0256]],
            [[0.46064, -0.97376], [1.98688, 0.19752]],
        ],
    ),
}


class _Given:
    """Gradients that are given, not computed."""

    def run(self, weights: dict[str, Array], batch: Batch, step: int = 0) -> Result:
        factor = np.float32(FACTORS[step])
        return Result(0.0, {k: v.astype(np.float32) * factor for k, v in GRADS.items()})


@pytest.mark.parametrize("name", TORCH)
def test_steps_are_pytorchs(name: str) -> None:
    optimiser, rate, wanted = TORCH[name]
    begun = {key: value.astype(np.float32) for key, value in WEIGHTS.items()}
    progress = Progress(begun, optimiser.start(begun))
    settings = Settings(optimiser=optimiser, average=0.9)
    nothing = Batch({}, np.zeros(1), np.zeros(1, np.int64))
    for _ in FACTORS:
        progress, _ = take_step(_Given(), progress, [nothing], settings, rate)  # type: ignore[arg-type]
    found = [progress.weights["w"], progress.weights["b"][None], progress.average["w"]]
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=3e-6, atol=1e-6)


def test_lion_steps_by_the_sign_alone() -> None:
    """Chen et al. (2023), algorithm 2, by hand: signs of 0.9 m + 0.1 g, then m."""
    optimiser = Optimiser("lion", clip=0)
    weights: dict[str, Array] = {"w": np.zeros(2, np.float32)}
    state = optimiser.start(weights)
    weights, state = optimiser.step(weights, {"w": np.array([1.0, -2.0])}, state, 1, 0.1)
    np.testing.assert_allclose(weights["w"], [-0.1, 0.1])
    np.testing.assert_allclose(state["mean:w"], [0.01, -0.02])
    # 0.9 * 0.01 - 0.1 * 0.05 is above zero, and -0.9 * 0.02 + 0.1 * 0.3 as well.
    weights, state = optimiser.step(weights, {"w": np.array([-0.05, 0.3])}, state, 2, 0.1)
    np.testing.assert_allclose(weights["w"], [-0.2, 0.0], atol=1e-7)


def test_the_cosine_is_pytorchs() -> None:
    found = [rate_at("cosine", 1.0, step, 8, 0) for step in range(8)]
    # torch.optim.lr_scheduler.CosineAnnealingLR(T_max=8)
    wanted = [1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449]
    wanted += [0.5, 0.30865828381745514, 0.14644660940672627, 0.03806023374435664]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_rate_rises_over_the_warm_up_and_then_falls_in_a_line() -> None:
    found = [rate_at("linear", 1.0, step, 6, 2) for step in range(6)]
    assert found == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_step_leaves_what_it_began_with() -> None:
    optimiser = Optimiser()
    begun = {key: value.astype(np.float32) for key, value in WEIGHTS.items()}
    state = optimiser.start(begun)
    optimiser.step(begun, GRADS, state, 1, 0.1)
    assert all(not value.any() for value in state.values())
    np.testing.assert_array_equal(begun["w"], WEIGHTS["w"].astype(np.float32))
