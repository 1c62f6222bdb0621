"""Joining the weights of several modules into those of one slot."""

import numpy as np

from onnx_adapt.checkpoints.placing.joining import joined_apart, joined_beside


def test_columns_beside_each_other_have_units_of_their_own() -> None:
    rng = np.random.default_rng(0)
    one = {
        "down": rng.normal(size=(4, 2)),
        "up": np.pad(rng.normal(size=(2, 3)), [(0, 0), (0, 5)]),
    }
    two = {
        "down": rng.normal(size=(4, 3)),
        "up": np.pad(rng.normal(size=(3, 5)), [(0, 0), (3, 0)]),
    }
    both = joined_beside(one, two)
    assert both["down"].shape == (4, 5)
    expected = one["down"] @ one["up"] + two["down"] @ two["up"]
    np.testing.assert_allclose(both["down"] @ both["up"], expected)


def test_matrices_of_their_own_share_the_units() -> None:
    """Two matrices `(4, 6)` side by side, with adapters of rank 2 and 3."""
    rng = np.random.default_rng(1)
    first = rng.normal(size=(4, 2)), rng.normal(size=(2, 6))
    second = rng.normal(size=(4, 3)), rng.normal(size=(3, 6))
    both = joined_apart(
        {
            "down": np.pad(first[0], [(0, 4), (0, 0)]),
            "up": np.pad(first[1], [(0, 0), (0, 6)]),
        },
        {
            "down": np.pad(second[0], [(4, 0), (0, 0)]),
            "up": np.pad(second[1], [(0, 0), (6, 0)]),
        },
    )
    assert both["down"].shape == (8, 3)
    np.testing.assert_allclose(both["down"][:4] @ both["up"][:, :6], first[0] @ first[1])
    np.testing.assert_allclose(both["down"][4:] @ both["up"][:, 6:], second[0] @ second[1])


def test_a_factor_is_multiplied_and_what_only_one_has_is_kept() -> None:
    one = {"scale": np.array([2.0, 1.0])}
    two = {"scale": np.array([1.0, 3.0]), "down": np.ones((2, 1)), "up": np.ones((1, 2))}
    both = joined_beside(one, two)
    np.testing.assert_array_equal(both["scale"], [2.0, 3.0])
    assert sorted(both) == ["down", "scale", "up"]
