"""One-dimensional k-means: the values are sorted once; a round is a binary search and sums over some blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.forms import Clustered
from edgecompress.cluster.partition import best_partition

Array = NDArray[Any]

_MAX_ROUNDS = 300
_CHUNK = 1 << 20
_CELLS = 512  # of the sketch, at least; 4 for each cluster


def kmeans(values: Array, clusters: int, importance: Array | None = None) -> Clustered:
    """Cluster ``values`` around at most ``clusters`` centroids (Lloyd 1982).

    The rounds start from the best partition of a sketch of the values, which for a few hundred values is the best of
    all; where there are no more distinct values than clusters, these are the centroids. Clusters that end up empty are
    dropped. Needs about 5 bytes of memory per float32 value, 20 with ``importance``.

    Args:
        values: any shape, a floating type, finite.
        clusters: 1 .. 256.
        importance: weight of each value's squared error, finite, not negative, broadcastable to ``values``.

    Raises:
        ValueError: ``clusters`` is outside 1 .. 256, or ``values`` is empty.
    """
    if not 1 <= clusters <= 256:
        raise ValueError(f"clusters must lie in 1 .. 256, not {clusters}")
    if values.size == 0:
        raise ValueError("there are no values to cluster")
    flat = values.reshape(-1)
    centroids = _centroids(_sort(flat, _mass(importance, values.shape), clusters), clusters)
    return _assign(flat, np.unique(centroids.astype(values.dtype)), values.shape)


def _mass(importance: Array | None, shape: tuple[int, ...]) -> Array | None:
    """Return one float32 weight per value, at most 1; ``None`` where all are equal to zero."""
    greatest = 0.0 if importance is None else float(np.max(importance))
    if importance is None or greatest <= 0.0:
        return None
    return np.broadcast_to((importance / greatest).astype(np.float32), shape).reshape(-1)


@dataclass(frozen=True)
class _Sorted:
    """Rising values, their mass, and both summed over every whole ``block`` of consecutive values, then two zeros."""

    values: Array
    mass: Array | None
    block: int
    block_masses: Array
    block_sums: Array


def _sort(flat: Array, mass: Array | None, clusters: int) -> _Sorted:
    wide = flat.astype(np.float32) if flat.itemsize < 4 else flat
    if mass is None:
        values = np.sort(wide)
    else:
        order = np.argsort(wide)
        values, mass = wide[order], mass[order]
        del order
    # A round reads size / block sums and 2 * block values per cluster: this size makes their total the least.
    block = max(1, math.isqrt(values.size // (2 * clusters)))
    whole = values.size // block
    masses, sums = np.zeros((2, whole + 2))
    step = max(1, _CHUNK // block)
    for first in range(0, whole, step):
        last = min(first + step, whole)
        chunk = slice(first * block, last * block)
        weights = np.ones(1) if mass is None else mass[chunk].astype(np.float64)
        sums[first:last] = (weights * values[chunk]).reshape(-1, block).sum(axis=1)
        masses[first:last] = block if mass is None else weights.reshape(-1, block).sum(axis=1)
    return _Sorted(values, mass, block, masses, sums)


def _centroids(data: _Sorted, clusters: int) -> Array:
    """Run Lloyd's rounds until no boundary moves; return the centroids of the clusters in use, rising, float64."""
    changes = data.values[1:] != data.values[:-1]
    if np.count_nonzero(changes) < clusters:
        return np.asarray(data.values[np.concatenate(([0], np.flatnonzero(changes) + 1))], dtype=np.float64)
    del changes
    edges = _start(data, clusters)
    centroids = np.asarray(data.values[edges[:-1]], dtype=np.float64)
    for _ in range(_MAX_ROUNDS):
        mass, total = _interval_sums(data, edges)
        used = mass > 0
        centroids = np.where(used, total / np.where(used, mass, 1.0), centroids)
        inner = np.searchsorted(data.values, boundaries(centroids, data.values.dtype), side="right")
        previous, edges = edges, np.concatenate(([0], inner, [data.values.size]))
        if np.array_equal(edges, previous):
            break
    return np.asarray(centroids[np.diff(edges) > 0])


def _start(data: _Sorted, clusters: int) -> Array:
    """Return the edges of the best partition of a sketch: of cells that hold about as much of the error each."""
    edges = _cells(data, max(_CELLS, 4 * clusters))
    mass, total = _interval_sums(data, edges)
    heavy = np.flatnonzero(mass > 0)  # cells without mass go with the one before
    edges = np.append(edges[heavy], data.values.size)
    edges[0] = 0
    return np.asarray(edges[best_partition(mass[heavy], total[heavy], min(clusters, heavy.size))])


def _cells(data: _Sorted, cells: int) -> Array:
    """Return the edges of about so many cells of consecutive values, one for each value where they are few.

    The widest in the cube root of mass times squared width are halved by value first: in that measure the intervals
    of the best partition are equal where they are many (Panter and Dite 1951).
    """
    values = data.values
    if values.size <= 2 * cells:
        return np.arange(values.size + 1)
    edges = np.unique(np.linspace(0, values.size, cells // 4 + 1).astype(np.intp))
    while edges.size <= cells:
        first, last = values[edges[:-1]].astype(np.float64), values[edges[1:] - 1].astype(np.float64)
        mass = np.diff(edges) if data.mass is None else _interval_sums(data, edges)[0]
        share = np.cbrt(mass) * np.cbrt(last - first) ** 2
        wide = share > share.max() / 2
        middles = (first[wide] / 2 + last[wide] / 2).astype(values.dtype)
        grown = np.unique(np.concatenate((edges, np.searchsorted(values, middles))))
        if grown.size == edges.size:
            break
        edges = grown
    return np.asarray(edges)


def boundaries(centroids: Array, dtype: np.dtype[Any]) -> Array:
    """Return, between rising centroids, the greatest values of ``dtype`` that are not nearer to the next one."""
    wide = centroids.astype(np.float64)
    exact = wide[:-1] / 2 + wide[1:] / 2
    middles = exact.astype(dtype)
    return np.where(middles > exact, np.nextafter(middles, dtype.type(-np.inf)), middles)


def _interval_sums(data: _Sorted, edges: Array) -> tuple[Array, Array]:
    """Return mass and mass times value, summed over the intervals between consecutive ``edges``.

    Whole blocks come from their sums, the rest is added value by value. Differences of running sums would be simpler,
    but lose small values that lie after large ones.
    """
    starts, stops = edges[:-1], edges[1:]
    first, last = -(-starts // data.block), stops // data.block
    pairs = np.stack([first, np.maximum(first, last)], axis=1).reshape(-1)
    whole = first < last
    mass = np.where(whole, np.add.reduceat(data.block_masses, pairs)[::2], 0.0)
    total = np.where(whole, np.add.reduceat(data.block_sums, pairs)[::2], 0.0)
    offsets = np.arange(data.block)
    for begin, least, end in (
        (starts, starts, np.minimum(first * data.block, stops)),
        (last * data.block, first * data.block, stops),
    ):
        at = begin[:, None] + offsets
        inside = (at >= least[:, None]) & (at < end[:, None])
        at = np.minimum(at, data.values.size - 1)
        weights = inside * (1.0 if data.mass is None else data.mass[at].astype(np.float64))
        mass += weights.sum(axis=1)
        total += (weights * data.values[at]).sum(axis=1)
    return mass, total


def _assign(flat: Array, codebook: Array, shape: tuple[int, ...]) -> Clustered:
    """Give every value its nearest centroid and drop centroids that nothing chose; in chunks, so memory stays small."""
    middles = boundaries(codebook, flat.dtype)
    indices = np.empty(flat.size, dtype=np.uint8)
    counts = np.zeros(codebook.size, dtype=np.int64)
    for start in range(0, flat.size, _CHUNK):
        chunk = np.searchsorted(middles, flat[start : start + _CHUNK])
        indices[start : start + _CHUNK] = chunk
        counts += np.bincount(chunk, minlength=codebook.size)
    chosen = counts > 0
    if not chosen.all():
        renumbered = (np.cumsum(chosen) - 1).astype(np.uint8)
        indices, codebook = renumbered[indices], codebook[chosen]
    return Clustered(codebook, indices.reshape(shape))
