"""The frequency form: the low-frequency block of a weight matrix's two-dimensional cosine transform."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.cosines import cosine_weights, dct_basis
from edgecompress.factorize.forms import Spectral
from edgecompress.factorize.separable import ridged
from edgecompress.moments import regularised

Array = NDArray[Any]


def spectral(weight: Array, ranks: tuple[int, int], moment: Array | None = None) -> Spectral:
    """Return the form that keeps the ``ranks = (p, q)`` lowest frequencies of the outputs and of the inputs.

    ``weight`` is canonical, ``(O, I, *kernel)``, seen as ``(O, d)``. Without a moment the coefficients are those of
    the cosine transform; with the ``(d, d)`` second moment of the input they minimise the output error under
    ``regularised(moment)``: ``B_p W C B_q^T (B_q C B_q^T)^-1``. Raises ``ValueError`` for ranks outside ``1 .. O`` and
    ``1 .. d`` or a moment of the wrong size.
    """
    matrix = _matrix(weight)
    for rank, limit in zip(ranks, matrix.shape, strict=True):
        if not 1 <= rank <= limit:
            raise ValueError(f"rank {rank} of {ranks} is outside 1 .. {limit}")
    rows, columns = dct_basis(ranks[0], matrix.shape[0]), dct_basis(ranks[1], matrix.shape[1])
    if moment is None:
        coefficients = rows @ matrix @ columns.T
    else:
        half = columns @ _damped(moment, matrix)
        coefficients = np.linalg.solve(ridged(half @ columns.T), half @ (rows @ matrix).T).T
    scaled = cosine_weights(ranks[0])[:, None] * coefficients * cosine_weights(ranks[1])
    return Spectral(scaled.astype(weight.dtype), weight.shape)


def block_errors(weight: Array, moment: Array | None = None) -> Array:
    """Return the error that every block leaves, shape ``(O, d)``: entry ``(p - 1, q - 1)`` for ``p x q`` kept.

    All blocks cost one Cholesky factorization: with ``B C B^T = L L^T`` over the full basis, keeping ``p x q``
    explains the sum of squares of the leading block of ``B_O W C B^T L^-T``, because leading blocks of ``L^-1`` are
    inverses of leading blocks.
    """
    matrix = _matrix(weight)
    rows, columns = dct_basis(matrix.shape[0], matrix.shape[0]), dct_basis(matrix.shape[1], matrix.shape[1])
    seen = rows @ matrix @ columns.T
    if moment is not None:
        turned = columns @ _damped(moment, matrix) @ columns.T
        seen = seen @ np.linalg.cholesky(ridged((turned + turned.T) / 2))  # B W C B^T L^-T = B W B^T L
    explained = np.cumsum(np.cumsum(seen**2, axis=0), axis=1)
    return np.asarray(np.maximum(explained[-1, -1] - explained, 0.0))


def best_block(weight: Array, share: float, moment: Array | None = None) -> tuple[int, int]:
    """Return the ``(p, q)`` with ``p q <= share O d`` (at least 1 x 1) that leaves the least error."""
    errors = block_errors(weight, moment)
    budget = max(1, int(share * errors.size + 1e-9))
    rows = np.arange(1, errors.shape[0] + 1)
    columns = np.minimum(budget // rows, errors.shape[1])
    rows, columns = rows[columns > 0], columns[columns > 0]
    chosen = int(np.argmin(errors[rows - 1, columns - 1]))
    return int(rows[chosen]), int(columns[chosen])


def _matrix(weight: Array) -> Array:
    return weight.reshape(weight.shape[0], -1).astype(np.float64)


def _damped(moment: Array, matrix: Array) -> Array:
    if moment.shape != (matrix.shape[1],) * 2:
        raise ValueError(f"the moment has shape {moment.shape}; the weight needs {(matrix.shape[1],) * 2}")
    return regularised(moment.astype(np.float64))
