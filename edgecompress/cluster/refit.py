"""What is left free once indices are chosen, in closed form: the values of a codebook."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.forms import Clustered
from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]

_WORK_LIMIT_MACS = 10**11
"""Multiply-accumulates to set up the system of a codebook: some seconds."""


def refit_codebook(weight: Array, form: Clustered, moments: Moments) -> Clustered:
    """Return the codebook of least ``tr((W - V) C (W - V)^T)`` for the indices that ``form`` has.

    ``C`` is the damped second moment; one linear system of as many unknowns as the codebook has values. Where setting
    it up from all output channels would take long, evenly spaced ones have to do. A value that is exactly zero stays
    zero, so that what is pruned stays pruned.
    """
    damped, size = damped_moment(moments, np.float32), form.codebook.size
    spacing = _spacing(weight, size, damped)
    groups = (len(damped), weight.shape[0] // len(damped), -1)
    indices, target = (np.ascontiguousarray(each.reshape(groups)[:, ::spacing]) for each in (form.indices, weight))
    system, right = np.zeros((size, size)), np.zeros(size)
    for index in range(size):
        felt = under((indices == index).astype(np.float32), damped)
        system[index] = np.bincount(indices.reshape(-1), weights=felt.reshape(-1), minlength=size)
        right[index] = np.sum(felt * target, dtype=np.float64)
    free = np.flatnonzero((form.codebook != 0) & (np.bincount(indices.reshape(-1), minlength=size) > 0))
    codebook = form.codebook.astype(np.float64)
    codebook[free] = np.linalg.solve(system[np.ix_(free, free)], right[free])
    order = np.argsort(codebook, kind="stable")
    places = np.argsort(order).astype(np.uint8)
    return Clustered(codebook[order].astype(form.codebook.dtype), places[form.indices])


def damped_moment(moments: Moments, kind: type[np.floating[Any]]) -> Array:
    """Return the damped second moment of every group in the precision ``kind``, shaped as it is known."""
    damp = regularised if moments.is_full else regularised_diagonal
    return np.stack([damp(each).astype(kind) for each in moments.second_moment])


def under(rows: Array, damped: Array) -> Array:
    """Return ``rows C`` for rows of a canonical weight and a damped second moment, in the shape of ``rows``."""
    grouped = rows.reshape(len(damped), -1, damped.shape[-1])
    felt = grouped @ damped if damped.ndim == 3 else grouped * damped[:, None]
    return felt.reshape(rows.shape)


def _spacing(weight: Array, clusters: int, damped: Array) -> int:
    """Return how many output channels to go on by, so that the work stays below ``_WORK_LIMIT_MACS``."""
    work = clusters * weight.size * (damped.shape[-1] if damped.ndim == 3 else 1)
    rows = weight.shape[0] // len(damped)
    return int(min(rows, -(-work // _WORK_LIMIT_MACS)))
