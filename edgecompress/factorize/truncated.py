"""The leading singular vectors of a matrix: exact where that is quick, by randomised subspace iteration where not.

Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 53, 2011 (algorithm 4.4): the range of
``A`` is sampled with a Gaussian matrix and iterated with ``A A^T``, orthonormalised after every product. The number of
iterations is not fixed: it goes on until the error hardly falls any more, because spectra of weights decay slowly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EXACT_SIDE = 1024
"""Up to this shorter side all singular vectors are computed."""

_LARGEST_SHARE = 0.3
_OVERSAMPLING = 0.5
_MIN_OVERSAMPLING = 16
_MAX_ITERATIONS = 40
_GAIN = 2e-4


def truncated_svd(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """Return ``left (m, rank)``, ``values (rank,)`` and ``right (rank, n)`` of a float64 matrix, values falling.

    Exact where the shorter side is at most ``EXACT_SIDE`` or the rank is above 0.3 of it; elsewhere the Frobenius error
    of the product is within 0.1 % of the least possible. Signs are as they come: callers fix them.
    """
    side = min(matrix.shape)
    if side <= EXACT_SIDE or rank > _LARGEST_SHARE * side:
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = _iterated(matrix.T, rank)
        return left.T, values, right.T
    return _iterated(matrix, rank)


def _iterated(matrix: Array, rank: int) -> tuple[Array, Array, Array]:
    """Return the leading singular vectors of a wide matrix; the iteration is in single precision, the result is not."""
    width = rank + max(_MIN_OVERSAMPLING, round(_OVERSAMPLING * rank))
    largest = float(np.max(np.abs(matrix)))
    rough = (matrix / (largest or 1.0)).astype(np.float32)
    total, before = float(np.sum(rough**2, dtype=np.float64)), np.inf
    sample = rough @ np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32)
    for _ in range(_MAX_ITERATIONS):
        basis = np.linalg.qr(sample)[0]
        reached = basis.T @ rough
        error = total - float(np.sum(np.linalg.eigvalsh(reached @ reached.T)[-rank:], dtype=np.float64))
        if not error < (1.0 - _GAIN) * before:
            break
        before = error
        sample = rough @ np.linalg.qr(reached.T)[0]
    basis = np.linalg.qr(basis.astype(np.float64))[0]
    reached = basis.T @ matrix
    squares, turn = np.linalg.eigh(reached @ reached.T)
    turn = turn[:, ::-1][:, :rank]
    values = np.sqrt(np.maximum(squares[::-1][:rank], 0.0))
    right = turn.T @ reached / np.where(values > 0, values, 1.0)[:, None]
    return basis @ turn, values, right
