"""Shared by the tests of sessions: adapters for `adapter_models.adapted`, and their truth."""

from pathlib import Path

import numpy as np
from adapter_models import B2, W1, W2, adapted, weights

import onnx_adapt as oa

X = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
BASE = np.maximum(X @ W1.T, 0) @ W2.T + B2


def adapter(name: str, seed: int, size: int = 3) -> oa.Adapter:
    """Random weights for both slots of `adapted`, of a bottleneck of their own."""
    slots = {"fc1": weights(size, seed), "fc2": weights(size + 1, seed + 100)}
    return oa.make_adapter(adapted(), name, slots)


FR, DE = adapter("fr", 1), adapter("de", 2, 5)


def adapted_file(folder: Path) -> Path:
    """`adapted` as a file."""
    return oa.save_model(adapted(), folder / "adapted.onnx").path


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether they agree to what float32 sums allow; adapters move outputs by whole units."""
    return found.shape == expected.shape and bool(np.abs(found - expected).max() < 1e-3)
