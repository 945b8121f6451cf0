"""Truncated SVD of a weight: plain, or under the second moment of the layer's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import LowRank
from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]


def plain_svd(weight: Array, rank: int) -> LowRank:
    """Return the best rank-``rank`` form of ``weight`` in the Frobenius norm (Eckart and Young 1936).

    ``weight`` has canonical shape ``(O, I, *kernel)``. The singular values are shared evenly between the factors, so
    that both have similar ranges. Raises ``ValueError`` for a rank outside ``1 .. min(O, I * prod(kernel))``.
    """
    matrix = _matrix(weight, rank)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return _form(left[:, :rank] * root, root[:, None] * right[:rank], weight)


def calibrated_svd(weight: Array, rank: int, moments: Moments) -> LowRank:
    """Return the rank-``rank`` form that minimises ``tr((W - V) C (W - V)^T)``: the error of the layer's output.

    With ``C`` the (regularised) second moment of the input, the optimal ``V`` is ``U U^T W`` where ``U`` holds the
    leading eigenvectors of ``W C W^T`` (Zhang et al. 2016, eq. 6, the linear case): the left singular vectors of
    ``W S`` for any ``S S^T = C``. Where only the diagonal of ``C`` is known, the rest counts as zero. The scale is
    shared so that both factors have the same norm per component.

    Raises ``ValueError`` as ``plain_svd`` does, and for moments of a grouped layer.
    """
    matrix = _matrix(weight, rank)
    if moments.second_moment.shape[0] != 1:
        raise ValueError("calibrated SVD needs the second moment of an ungrouped layer")
    left, _, _ = np.linalg.svd(_times_root(matrix, moments), full_matrices=False)
    basis = left[:, :rank]
    right = basis.T @ matrix
    norms = np.sqrt(np.maximum(np.linalg.norm(right, axis=1), np.finfo(np.float32).tiny))
    return _form(basis * norms, right / norms[:, None], weight)


def spectrum(weight: Array) -> Array:
    """Return the singular values of a canonical weight seen as a matrix, falling."""
    return np.asarray(np.linalg.svd(weight.reshape(weight.shape[0], -1).astype(np.float64), compute_uv=False))


def _matrix(weight: Array, rank: int) -> Array:
    matrix = weight.reshape(weight.shape[0], -1).astype(np.float64)
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank {rank} is outside 1 .. {min(matrix.shape)}")
    return matrix


def _times_root(matrix: Array, moments: Moments) -> Array:
    """Return ``matrix @ S`` with ``S S^T`` the regularised moment."""
    if not moments.is_full:
        return np.asarray(matrix * np.sqrt(regularised_diagonal(moments.second_moment[0])))
    moment = regularised(moments.second_moment[0])
    try:
        return np.asarray(matrix @ np.linalg.cholesky(moment))
    except np.linalg.LinAlgError:  # rounding in a wide moment outweighs the regularisation
        values, vectors = np.linalg.eigh(moment)
        return np.asarray(matrix @ (vectors * np.sqrt(np.maximum(values, 0.0))))


def _form(left: Array, right: Array, weight: Array) -> LowRank:
    """Fix the signs (LAPACK builds differ in them), round to the weight's type and give the kernel its shape back."""
    strongest = np.take_along_axis(left, np.argmax(np.abs(left), axis=0)[None], axis=0)[0]
    signs = np.where(strongest < 0, -1.0, 1.0)
    left, right = left * signs, right * signs[:, None]
    return LowRank(left.astype(weight.dtype), right.astype(weight.dtype).reshape(-1, *weight.shape[1:]))
