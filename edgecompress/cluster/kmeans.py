"""One-dimensional k-means by sorting and prefix sums: O(n log n) once, then O(k log n) a round."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.forms import Clustered

Array = NDArray[Any]

_MAX_ROUNDS = 300
_BLOCK = 1 << 20


def kmeans(values: Array, clusters: int, importance: Array | None = None) -> Clustered:
    """Cluster ``values`` around at most ``clusters`` centroids (Lloyd 1982).

    The centroids start linearly between the least and the greatest value, which keeps the rare large weights
    represented (Han et al. 2016, section 3.2). In one dimension clusters are intervals, so on the sorted values a round is a
    binary search for the boundaries and a difference of prefix sums. Empty clusters are dropped.

    Args:
        values: any shape, a floating type, finite.
        clusters: 1 .. 256.
        importance: weight of each value's squared error, broadcastable to the shape of ``values``, not negative.

    Raises:
        ValueError: ``clusters`` is outside 1 .. 256, or ``values`` is empty.
    """
    if not 1 <= clusters <= 256:
        raise ValueError(f"clusters must lie in 1 .. 256, not {clusters}")
    if values.size == 0:
        raise ValueError("there are no values to cluster")
    flat = values.reshape(-1)
    if importance is None:
        ordered = np.sort(flat)
        mass = None
    else:
        order = np.argsort(flat, kind="stable")
        ordered = flat[order]
        mass = np.broadcast_to(importance, values.shape).reshape(-1)[order].astype(np.float64)
    centroids = _lloyd(ordered, mass, clusters)
    codebook = np.unique(centroids.astype(values.dtype))
    return _assign(flat, codebook, values.shape)


def _lloyd(ordered: Array, mass: Array | None, clusters: int) -> Array:
    """Run Lloyd's rounds on rising values until no boundary moves; return the centroids of the clusters in use."""
    weights_below, sums_below = _prefix_sums(ordered, mass)
    centroids = np.linspace(float(ordered[0]), float(ordered[-1]), clusters)
    previous: Array = np.empty(0)
    for _ in range(_MAX_ROUNDS):
        bounds = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate(([0], bounds, [ordered.size]))
        if np.array_equal(edges, previous):
            break
        previous = edges
        weight = np.diff(weights_below[edges])
        total = np.diff(sums_below[edges])
        used = weight > 0
        centroids = np.where(used, total / np.where(used, weight, 1.0), centroids)
        centroids = np.maximum.accumulate(centroids)  # an empty cluster may have been passed by a neighbour
    occupied = np.diff(previous) > 0
    return np.asarray(centroids[occupied])


def _prefix_sums(ordered: Array, mass: Array | None) -> tuple[Array, Array]:
    """Return the running sums of mass and of mass times value, each starting with zero, float64."""
    size = ordered.size
    sums = np.zeros(size + 1)
    if mass is None:
        np.cumsum(ordered, dtype=np.float64, out=sums[1:])
        return np.arange(size + 1, dtype=np.float64), sums
    # A floor under the importance keeps values that calibration never saw from being left without a centroid.
    mass = mass + 1e-3 * (float(mass.mean()) or 1.0)
    weights = np.zeros(size + 1)
    np.cumsum(mass, out=weights[1:])
    np.cumsum(mass * ordered, out=sums[1:])
    return weights, sums


def _assign(flat: Array, codebook: Array, shape: tuple[int, ...]) -> Clustered:
    """Give every value its nearest centroid and drop centroids that nothing chose; blockwise, so memory stays small."""
    middles = (codebook[1:].astype(np.float64) + codebook[:-1].astype(np.float64)) / 2
    middles = middles.astype(flat.dtype)
    indices = np.empty(flat.size, dtype=np.uint8)
    for start in range(0, flat.size, _BLOCK):
        indices[start : start + _BLOCK] = np.searchsorted(middles, flat[start : start + _BLOCK], side="left")
    chosen = np.bincount(indices, minlength=codebook.size) > 0
    if not chosen.all():
        renumbered = (np.cumsum(chosen) - 1).astype(np.uint8)
        indices, codebook = renumbered[indices], codebook[chosen]
    return Clustered(codebook, indices.reshape(shape))
