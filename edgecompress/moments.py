"""Second moments of layer inputs, as values: accumulate them batch by batch, normalise, regularise. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Moments:
    """The uncentred second moment ``mean(x x^T)`` of what flows into a layer, and its mean.

    Shapes:
        second_moment: ``(groups, d, d)``, or ``(groups, d)`` where only the diagonal was kept; ``d`` is
            ``C_in / groups * prod(kernel)``, in the order of a flattened canonical weight row. float64.
        count: how many positions were averaged.
        mean: ``(groups, d)``, float64; ``None`` stands for zero.
    """

    layer: str
    second_moment: Array
    count: int
    mean: Array | None = None

    @property
    def is_full(self) -> bool:
        """Whether the off-diagonal entries are known."""
        return self.second_moment.ndim == 3

    @property
    def diagonal(self) -> Array:
        """The mean square of every input, shape ``(groups, d)``."""
        return np.diagonal(self.second_moment, axis1=1, axis2=2) if self.is_full else self.second_moment


def accumulate(moments: Moments | None, layer: str, patches: Array, *, full: bool) -> Moments:
    """Add a batch of input patches, shape ``(positions, groups, d)``, to the moments gathered so far.

    Products are formed in the precision of ``patches`` (one matrix product per group), in float64 where they overflow,
    and summed in float64.
    """
    groups = [np.ascontiguousarray(patches[:, group]) for group in range(patches.shape[1])]
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.stack([_products(rows, full) for rows in groups])
    if not np.isfinite(total).all():
        total = np.stack([_products(rows.astype(np.float64), full) for rows in groups])
    count = patches.shape[0]
    sums = patches.sum(axis=0, dtype=np.float64)
    if moments is None:
        return Moments(layer, total / count, count, sums / count)
    merged = moments.count + count
    share = moments.count / merged
    mean = None if moments.mean is None else moments.mean * share + sums / merged
    return Moments(layer, moments.second_moment * share + total / merged, merged, mean)


def centred(moments: Moments) -> Moments:
    """Return the covariance in place of the second moment: what matters where a bias can take up the mean."""
    if moments.mean is None:
        return moments
    mean = moments.mean
    square = mean[:, :, None] * mean[:, None, :] if moments.is_full else mean**2
    return Moments(moments.layer, moments.second_moment - square, moments.count)


def _products(rows: Array, full: bool) -> Array:
    """Return the sum of ``x x^T``, or of its diagonal, over the rows."""
    if full:  # x.T @ x of one array is a symmetric product for BLAS: half the work
        return np.asarray(rows.T @ rows, dtype=np.float64)
    return np.asarray(np.einsum("pd,pd->d", rows, rows, dtype=np.float64))


@dataclass(frozen=True)
class PairedMoments:
    """What flows into a layer of a compressed model, beside what flows into it in the original.

    Shapes:
        moments: of the compressed model's input ``q``
        cross: ``mean(x q^T)``, ``(groups, d, d)``, with ``x`` the original's input; ``None`` where only the diagonal of
            the moments is kept
        source_mean: ``mean(x)``, ``(groups, d)``
    """

    moments: Moments
    cross: Array | None
    source_mean: Array


def accumulate_pair(
    pair: PairedMoments | None, layer: str, original: Array, compressed: Array, *, full: bool
) -> PairedMoments:
    """Add a batch of patches of both models, ``(positions, groups, d)`` each, taken at the same positions."""
    moments = accumulate(pair.moments if pair else None, layer, compressed, full=full)
    share = len(original) / moments.count
    mean = original.mean(axis=0, dtype=np.float64) * share
    cross = None
    if full:
        groups = range(original.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            cross = np.stack([(original[:, g].T @ compressed[:, g]).astype(np.float64) for g in groups])
        if not np.isfinite(cross).all():
            wide = original.astype(np.float64), compressed.astype(np.float64)
            cross = np.stack([wide[0][:, g].T @ wide[1][:, g] for g in groups])
        cross /= moments.count
    if pair is not None:
        mean += pair.source_mean * (1.0 - share)
        if cross is not None and pair.cross is not None:
            cross += pair.cross * (1.0 - share)
    return PairedMoments(moments, cross, mean)


def centred_pair(pair: PairedMoments) -> PairedMoments:
    """Return the covariances in place of the second moments."""
    mean = pair.moments.mean
    cross = pair.cross
    if cross is not None and mean is not None:
        cross = cross - pair.source_mean[:, :, None] * mean[:, None, :]
    return PairedMoments(centred(pair.moments), cross, pair.source_mean)


def refitted(weight: Array, pair: PairedMoments) -> Array:
    """Return the weight that, on the compressed model's input ``q``, comes nearest to what ``weight`` gives on ``x``.

    ``W* = (W mean(x q^T) + l W)(mean(q q^T) + l I)^-1`` minimises ``mean |W x - W* q|^2 + l |W* - W|^2`` with ``l`` 1 %
    of the mean diagonal, the damping of ``regularised``: what a form of ``W*`` loses under ``regularised(mean(q q^T))``
    is then exactly what it adds to that sum. ``weight`` is canonical; the result is float64 of the same shape. Where
    only the diagonal is known, ``weight`` is returned as it is.
    """
    if pair.cross is None:
        return weight
    groups = pair.cross.shape[0]
    rows = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1)
    found = []
    for own, cross, moment in zip(rows, pair.cross, pair.moments.second_moment, strict=True):
        damped = regularised(moment)
        excess = (damped - moment)[0, 0]  # l, or 1 for inputs that are always zero
        found.append(np.linalg.solve(damped, (own @ cross + excess * own).T).T)
    return np.stack(found).reshape(weight.shape)


def regularised(second_moment: Array, damping: float = 0.01) -> Array:
    """Return ``second_moment + damping * mean(diagonal) * I`` for one ``(d, d)`` matrix.

    Keeps every direction a little alive, so that an input never seen in calibration is not given up entirely
    (the 1 % of Frantar et al. 2022). A zero matrix (dead inputs) becomes the identity: the plain problem.
    """
    mean = float(np.mean(np.diagonal(second_moment)))
    if mean <= 0.0:
        return np.eye(second_moment.shape[0])
    return second_moment + damping * mean * np.eye(second_moment.shape[0])


def regularised_diagonal(diagonal: Array, damping: float = 0.01) -> Array:
    """Return the diagonal of ``regularised(np.diag(diagonal))`` without forming the matrix."""
    mean = float(np.mean(diagonal))
    return diagonal + damping * mean if mean > 0.0 else np.ones_like(diagonal)


def output_errors(weight: Array, approximation: Array, moments: Moments) -> tuple[float, float]:
    """Return ``(tr(W C W^T), tr((W - V) C (W - V)^T))`` for canonical weights ``(C_out, C_in / groups, *kernel)``."""
    groups = moments.second_moment.shape[0]
    rows = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1)
    wrong = rows - approximation.astype(np.float64).reshape(rows.shape)
    return _energy(rows, moments), _energy(wrong, moments)


def _energy(rows: Array, moments: Moments) -> float:
    """Return the mean energy of ``rows @ x`` for rows of shape ``(groups, outputs, d)``."""
    if moments.is_full:
        return float(np.sum(np.matmul(rows, moments.second_moment) * rows))
    return float(np.sum(rows**2 * moments.second_moment[:, None, :]))


def sqnr_db(signal: float, error: float) -> float | None:
    """Return ``10 log10(signal / error)``; ``None`` where it is infinite or unknown."""
    if not (signal > 0.0 and error > 0.0):
        return None
    return float(10.0 * np.log10(signal / error))
