"""Which weights of a layer become zero, the least that matter, and how the others make up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.refit import damped_moment, under

if TYPE_CHECKING:
    from edgecompress.moments import Moments

Array = NDArray[Any]

_STAGES = 8
_STEPS = 8


def prune(weight: Array, share: float, moments: Moments | None = None) -> Array:
    """Return ``weight`` with ``share`` of its values zero: a whole number of them, rounded.

    Without moments those of least magnitude go, and the others stay. With them the share rises in stages; each takes
    those whose squared value times the mean square of their input is least, and lets the others make up for all that
    is gone, by steps of conjugate gradients towards the least ``tr((W - V) C (W - V)^T)``: what stays is corrected
    under the whole second moment (Hassibi and Stork 1993), at one product of a weight with ``C`` a step.

    Args:
        weight: ``(C_out, ..)``, canonical with ``moments``; finite.
        share: 0 .. 1.
        moments: of the layer's inputs.

    Raises:
        ValueError: ``share`` is outside 0 .. 1.
    """
    if moments is None:
        return np.where(keep_mask(saliencies(weight, None), share), weight, np.zeros((), weight.dtype))
    kind = np.promote_types(weight.dtype, np.float32).type
    damped = damped_moment(moments, kind)
    scale = _mean_squares(weight, damped)
    current = weight.astype(kind)
    gone = np.zeros(weight.shape, dtype=np.bool_)
    for stage in range(1, _STAGES + 1):
        saliency = np.where(gone, -1.0, current.astype(np.float64) ** 2 * scale)
        gone = ~keep_mask(saliency, share * stage / _STAGES)
        current = np.where(gone, 0, current)
        if damped.ndim == 3:  # weights of unrelated inputs cannot make up for each other
            current = _corrected(weight, current, gone, damped)
    return current.astype(weight.dtype)


def saliencies(weight: Array, moments: Moments | None) -> Array:
    """Return what each weight adds to the error of the layer's output when it alone becomes zero, float64.

    Its square times the damped mean square of its input; without moments its square. In the shape of ``weight``, which
    is canonical.
    """
    squares = weight.astype(np.float64) ** 2
    return squares if moments is None else squares * _mean_squares(weight, damped_moment(moments, np.float64))


def keep_mask(saliency: Array, share: float) -> NDArray[np.bool_]:
    """Return what is kept where ``share`` of all, rounded to a whole number, become zero: the least salient.

    Of equals, the first become zero. Raises ``ValueError`` for a share outside 0 .. 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must lie in 0 .. 1, not {share}")
    keep = np.ones(saliency.size, dtype=np.bool_)
    keep[np.argsort(saliency, axis=None, kind="stable")[: round(share * saliency.size)]] = False
    return keep.reshape(saliency.shape)


def _mean_squares(weight: Array, damped: Array) -> Array:
    """Return the damped mean square of each weight's input, in the shape of ``weight``."""
    squares = np.diagonal(damped, axis1=1, axis2=2) if damped.ndim == 3 else damped
    return np.repeat(squares, weight.shape[0] // len(squares), axis=0).reshape(weight.shape)


def _corrected(weight: Array, start: Array, gone: Array, damped: Array) -> Array:
    """Return values, zero where ``gone``, that lose less than ``start``: conjugate gradients, every row its own."""
    rows = (weight.shape[0], -1)
    scale, keep = _mean_squares(weight, damped).reshape(rows), ~gone.reshape(rows)
    found = start.reshape(rows).copy()
    slope = under(weight - start, damped).reshape(rows) * keep
    direction, before = np.zeros_like(found), np.ones((len(found), 1), found.dtype)
    for _ in range(_STEPS):
        steep = slope / scale
        energy = _row_products(slope, steep)
        direction = steep + energy / before * direction
        felt = under(direction, damped) * keep
        curvature = _row_products(direction, felt)
        length = np.divide(energy, curvature, out=np.zeros_like(energy), where=curvature > 0)
        found += length * direction
        slope -= length * felt
        before = np.where(energy > 0, energy, 1)
    return found.reshape(weight.shape)


def _row_products(left: Array, right: Array) -> Array:
    return np.asarray(np.einsum("od,od->o", left, right))[:, None]
