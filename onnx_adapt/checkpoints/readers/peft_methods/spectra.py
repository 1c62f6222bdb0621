"""Methods of PEFT that train a few coefficients of a transform of the weight.

Which coefficients is not in the file, only the seed that PyTorch draws them with. Its draw is
simple enough to be repeated: the generator is numpy's own Mersenne Twister, and a permutation
of n is n - 1 swaps, of which only the first matter here. For example the first 2 of 5 entries:

    0 1 2 3 4     number mod 5 = 3: swap entries 0 and 0 + 3
    3 1 2 0 4     number mod 4 = 1: swap entries 1 and 1 + 1
    3 2 ...
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnx_adapt.checkpoints.edits import Edit
from onnx_adapt.checkpoints.readers.peft_methods.reweights import adding
from onnx_adapt.checkpoints.readers.peft_methods.tensors import ModuleTensors
from onnx_adapt.checkpoints.readers.saved import number
from onnx_adapt.dtypes import Array
from onnx_adapt.errors import CheckpointError

_MOST = (2**32 - 1) // 20
"""From this size on PyTorch draws numbers of 64 bits."""


def fourierft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """FourierFT (arXiv 2405.03003): coefficients of the Fourier transform of what is added."""
    values, scale = found.read("fourierft_spectrum"), _scaling(found, 150.0)
    seed = _seed(found)

    def added(weight: Array) -> Array:
        spectrum = np.zeros(weight.size)
        spectrum[drawn_places(seed, weight.size, len(values))] = values
        return np.fft.ifft2(spectrum.reshape(weight.shape)).real * scale

    yield adding(found.module, added, len(values))


def waveft_edits(found: ModuleTensors) -> Iterator[Edit]:
    """WaveFT (arXiv 2505.12532): coefficients of a wavelet transform of what is added.

    A single coefficient is what is added itself where `use_idwt` is off.
    """
    values, scale = found.read("waveft_spectrum"), _scaling(found, 25.0)
    seed, family = _seed(found), found.config.get("wavelet_family", "db1")
    transforms = found.config.get("use_idwt", True)
    if transforms and family != "db1":
        raise CheckpointError(
            f"WaveFT with wavelet_family={family!r} is not supported: of the wavelets only "
            "db1, PEFT's default, is",
            hint="merge the adapter in PyTorch and export again",
        )

    def added(weight: Array) -> Array:
        spectrum = np.zeros(weight.size)
        spectrum[drawn_places(seed, weight.size, len(values))] = values
        spectrum = spectrum.reshape(weight.shape)
        return scale * (_from_haar(spectrum) if transforms else spectrum)

    yield adding(found.module, added, len(values))


def drawn_places(seed: int, size: int, count: int) -> Array:
    """The first entries of `torch.randperm(size)` on the CPU, for a seed.

    Raises:
        CheckpointError: If PyTorch draws them otherwise, or there are not so many.
    """
    if not 0 < count <= size or size >= _MOST:
        raise CheckpointError(
            f"{count} places drawn from a weight of {size} numbers cannot be repeated",
            hint="is it an adapter for another size of this model?",
        )
    numbers = np.random.RandomState(seed & 0xFFFFFFFF).randint(
        0, 2**32, size=count, dtype=np.uint32
    )
    moved: dict[int, int] = {}
    places = []
    for i, drawn in enumerate(numbers.tolist()):
        other = i + drawn % (size - i)
        places.append(moved.get(other, other))
        moved[other] = moved.get(i, i)
    return np.array(places)


def _from_haar(spectrum: Array) -> Array:
    """Haar's wavelet transform (db1) undone, of a matrix that is padded to even sizes.

    Its quarters are the means, and the differences along each axis and along both.
    """
    rows, columns = spectrum.shape
    padded = np.pad(spectrum, [(0, rows % 2), (0, columns % 2)])
    half = padded.shape[0] // 2, padded.shape[1] // 2
    means, across = padded[: half[0], : half[1]], padded[: half[0], half[1] :]
    down, both = padded[half[0] :, : half[1]], padded[half[0] :, half[1] :]
    result = np.empty(padded.shape)
    result[::2, ::2] = means + across + down + both
    result[::2, 1::2] = means + across - down - both
    result[1::2, ::2] = means - across + down - both
    result[1::2, 1::2] = means - across - down + both
    return result[:rows, :columns] / 2


def _scaling(found: ModuleTensors, default: float) -> float:
    return number(found.config.get("scaling", default), "scaling")


def _seed(found: ModuleTensors) -> int:
    """The seed of the places, of which there are as many as values in a whole file."""
    config = found.config
    (values,) = found.parts.values()
    varies = config.get("n_frequency_pattern") or config.get("proportional_parameters")
    if not varies and config.get("n_frequency", values.size) != values.size:
        raise CheckpointError(
            f"module {found.module!r} has {values.size} coefficients; the configuration says "
            f"n_frequency={config['n_frequency']}"
        )
    seed = found.config.get("random_loc_seed", 777)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise CheckpointError(f"random_loc_seed is {seed!r}, which is no seed")
    return seed
