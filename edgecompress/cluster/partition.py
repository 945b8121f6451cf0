"""The best way to cut a row of cells into intervals, by dynamic programming."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Positions = NDArray[np.intp]


def best_partition(mass: Array, total: Array, clusters: int) -> Positions:
    """Return the edges of the intervals of least total squared distance to their means (Wang and Song 2011).

    The last interval of the best partition of a longer row starts no earlier, so a row of ``n`` cells needs
    ``O(clusters n log n)`` by divide and conquer.

    Args:
        mass: of each cell, ``(n,)``, positive.
        total: mass times mean value of each cell, ``(n,)``; the means rise.
        clusters: how many intervals, at most ``n``.

    Returns:
        ``(clusters + 1,)``, from 0 to ``n``, strictly rising.
    """
    # the squares of all cells are the same in every partition: the best has the greatest sum of total^2 / mass
    centre = float(total.sum() / mass.sum())
    masses = np.concatenate(([0.0], np.cumsum(mass)))
    totals = np.concatenate(([0.0], np.cumsum(total - centre * mass)))
    reached = np.full(masses.size, -np.inf)
    reached[0] = 0.0
    choices = []
    for taken in range(1, clusters + 1):
        reached, origins = _one_more(reached, taken, masses, totals)
        choices.append(origins)
    edges = [masses.size - 1]
    for origins in reversed(choices):
        edges.append(int(origins[edges[-1]]))
    return np.array(edges[::-1])


def _one_more(reached: Array, taken: int, masses: Array, totals: Array) -> tuple[Array, Positions]:
    """Return the most that ``taken`` intervals reach by each end, and where the last of them starts.

    ``reached`` is the most that one interval less does. All ends of one level of the divide and conquer are looked at
    together, from every start between those of their neighbours.
    """
    last = masses.size - 1
    found, origins = np.full(masses.size, -np.inf), np.zeros(masses.size, dtype=np.intp)
    stride = 1 << (last - taken + 1).bit_length()
    while stride:
        ends = np.arange(taken + stride - 1, last + 1, 2 * stride)
        low = np.where(ends - stride >= taken, origins[np.maximum(ends - stride, 0)], taken - 1)
        high = np.where(ends + stride <= last, origins[np.minimum(ends + stride, last)], last)
        counts = np.minimum(high, ends - 1) - low + 1
        firsts = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(ends.size), counts)
        starts = np.arange(owner.size) - (firsts - low)[owner]
        until = ends[owner]
        sums = reached[starts] + (totals[until] - totals[starts]) ** 2 / (masses[until] - masses[starts])
        if ends.size:
            best = np.maximum.reduceat(sums, firsts)
            winners = np.flatnonzero(sums == best[owner])[::-1]  # of equals, the first is written last
            found[ends], origins[ends[owner[winners]]] = best, starts[winners]
        stride //= 2
    return found, origins
