"""Truncated SVD of a weight: plain, or under the second moment of the layer's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import AffineLowRank, LowRank
from edgecompress.factorize.truncated import truncated_svd
from edgecompress.moments import Moments, centred, regularised, regularised_diagonal

Array = NDArray[Any]


def plain_svd(weight: Array, rank: int) -> LowRank:
    """Return the best rank-``rank`` form of ``weight`` in the Frobenius norm (Eckart and Young 1936).

    ``weight`` has canonical shape ``(O, I, *kernel)``. The singular values are shared evenly between the factors, so
    that both have similar ranges. Raises ``ValueError`` for a rank outside ``1 .. min(O, I * prod(kernel))``.
    """
    matrix = _matrix(weight, rank)
    left, values, right = truncated_svd(matrix, rank)
    root = np.sqrt(values)
    return _form(*_signed(left * root, root[:, None] * right), weight)


def calibrated_svd(weight: Array, rank: int, moments: Moments) -> LowRank:
    """Return the rank-``rank`` form that minimises ``tr((W - V) C (W - V)^T)``: the error of the layer's output.

    With ``C`` the (regularised) second moment of the input, the optimal ``V`` is ``U U^T W`` where ``U`` holds the
    leading eigenvectors of ``W C W^T`` (Zhang et al. 2016, eq. 6, the linear case): the left singular vectors of
    ``W S`` for any ``S S^T = C``. Where only the diagonal of ``C`` is known, the rest counts as zero. The scale is
    shared so that both factors have the same norm per component.

    Raises ``ValueError`` as ``plain_svd`` does, and for moments of a grouped layer.
    """
    matrix = _matrix(weight, rank)
    _check_ungrouped(moments)
    basis, _, _ = truncated_svd(_times_root(matrix, moments), rank)
    return _form(*_signed(*_shared(basis, basis.T @ matrix)), weight)


def affine_svd(weight: Array, bias: Array, rank: int, moments: Moments | None = None) -> AffineLowRank:
    """Return the rank-``rank`` form of a weight ``(O, I, *kernel)`` and its bias ``(O,)`` together, seen as ``[W b]``.

    Without moments the truncated SVD of ``[W b]``. With them the output error is minimised: the input ``(x, 1)`` has
    the second moment ``[[C, m], [m^T, 1]]``, which is ``S S^T`` for ``S = [[L, m], [0, 1]]`` and the (regularised)
    covariance ``L L^T = C - m m^T``. Raises ``ValueError`` for a rank outside ``1 .. min(O, I * prod(kernel) + 1)``,
    a bias of another shape, and moments of a grouped layer.
    """
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"the bias has shape {bias.shape}; the weight needs {weight.shape[:1]}")
    matrix = weight.reshape(weight.shape[0], -1).astype(np.float64)
    column = bias.astype(np.float64)[:, None]
    whole = _checked(np.hstack([matrix, column]), rank)
    seen = whole
    if moments is not None:
        _check_ungrouped(moments)
        mean = np.zeros(matrix.shape[1]) if moments.mean is None else moments.mean[0]
        seen = np.hstack([_times_root(matrix, centred(moments)), matrix @ mean[:, None] + column])
    basis, _, _ = truncated_svd(seen, rank)
    left, right = _signed(*_shared(basis, basis.T @ whole))
    form = _form(left, right[:, :-1], weight)
    return AffineLowRank(form.left, form.right, right[:, -1].astype(weight.dtype))


def spectrum(weight: Array) -> Array:
    """Return the singular values of a canonical weight seen as a matrix, falling."""
    return np.asarray(np.linalg.svd(weight.reshape(weight.shape[0], -1).astype(np.float64), compute_uv=False))


def _matrix(weight: Array, rank: int) -> Array:
    return _checked(weight.reshape(weight.shape[0], -1).astype(np.float64), rank)


def _check_ungrouped(moments: Moments) -> None:
    if moments.second_moment.shape[0] != 1:
        raise ValueError("calibrated SVD needs the second moment of an ungrouped layer")


def _shared(basis: Array, right: Array) -> tuple[Array, Array]:
    """Share the scale of ``basis @ right`` so that both have the same norm per component."""
    norms = np.sqrt(np.maximum(np.linalg.norm(right, axis=1), np.finfo(np.float32).tiny))
    return basis * norms, right / norms[:, None]


def _checked(matrix: Array, rank: int) -> Array:
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


def _signed(left: Array, right: Array) -> tuple[Array, Array]:
    """Give the largest entry of every column of ``left`` a positive sign: LAPACK builds differ in signs."""
    strongest = np.take_along_axis(left, np.argmax(np.abs(left), axis=0)[None], axis=0)[0]
    signs = np.where(strongest < 0, -1.0, 1.0)
    return left * signs, right * signs[:, None]


def _form(left: Array, right: Array, weight: Array) -> LowRank:
    """Round to the weight's type and give the kernel its shape back."""
    return LowRank(left.astype(weight.dtype), right.astype(weight.dtype).reshape(-1, *weight.shape[1:]))
