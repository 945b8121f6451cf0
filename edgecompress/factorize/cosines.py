"""The cosines of the frequency form: exact for any length, because phases are reduced as integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def cosines(count: int, length: int) -> Array:
    """Return ``cos(pi (2 i + 1) k / (2 N))`` for the frequencies ``k < count`` (rows), ``N = length``, float64.

    The phase ``(2 i + 1) k`` is reduced modulo ``4 N`` in integers, so that it is exact for any length.
    """
    phase = np.outer(np.arange(count, dtype=np.int64), 2 * np.arange(length, dtype=np.int64) + 1) % (4 * length)
    return np.asarray(np.cos(phase * (np.pi / (2 * length))))


def cosine_weights(count: int) -> Array:
    """Return what makes rows of ``sqrt(2 / N) cosines`` orthonormal: ``sqrt(1 / 2)`` for frequency 0, else 1."""
    return np.where(np.arange(count) == 0, np.sqrt(0.5), 1.0)


def dct_basis(count: int, length: int) -> Array:
    """Return the ``count`` lowest orthonormal DCT-II vectors of ``length`` as rows, float64.

    ``B[k, i] = sqrt((2 - [k = 0]) / N) cos(pi (2 i + 1) k / (2 N))``.
    """
    return np.asarray(np.sqrt(2.0 / length) * cosine_weights(count)[:, None] * cosines(count, length))
