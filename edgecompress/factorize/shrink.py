"""Keep only some units of a layer: choose which, and fit the weight of the layer that reads them again.

Channel pruning with reconstruction (He, Zhang and Sun 2017, "Channel pruning for accelerating very deep neural
networks"; Luo, Wu and Lin 2017, "ThiNet"), but with no sampling and no training. With ``G`` the regularised second
moment of what flows into the reading layer, removing the inputs ``R`` of its weight ``W`` costs at best
``tr(W_R (H_RR)^-1 W_R^T)``, ``H = G^-1``; what is left is then ``W - W_R (H_RR)^-1 H_R:`` and the inverse
``H - H_:R (H_RR)^-1 H_R:`` (Hassibi and Stork 1993, "Optimal brain surgeon", for blocks of inputs).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]

_BATCH_SHARE = 1 / 16
_CANDIDATES = 4


def select_units(weight: Array, moments: Moments, units: int, count: int) -> Array:
    """Return the indices, rising, of the ``count`` units whose outputs ``weight`` needs most.

    ``weight`` is the canonical weight ``(O, I, *kernel)`` of the layer that reads the units; each of them owns
    ``I * prod(kernel) / units`` inputs that lie together. Units are removed one by one, each time the one without
    which the best fit of the others is least bad. Where only the diagonal of the moment is known, the units that
    give the output most energy are kept. Raises ``ValueError`` for a count outside ``1 .. units``, a number of units
    that does not divide the inputs, and moments of a grouped layer.
    """
    matrix = _checked(weight, moments, units)
    if not 1 <= count <= units:
        raise ValueError(f"{count} units are outside 1 .. {units}")
    if moments.is_full:
        return _eliminated(matrix, regularised(moments.second_moment[0]), units, count)
    energy = np.sum(matrix**2, axis=0) * regularised_diagonal(moments.second_moment[0])
    falling = np.argsort(-energy.reshape(units, -1).sum(axis=1), kind="stable")
    return np.sort(falling[:count])


def refit(weight: Array, moments: Moments, units: int, kept: Array) -> Array:
    """Return the weight that reads only the units ``kept`` and changes the output least; zero for all others.

    ``W'_S = W G_:S (G_SS)^-1`` minimises ``tr((W - W') G (W - W')^T)`` for ``G`` the regularised moment: where nothing
    is removed it is ``W``. Where only the diagonal is known, the weights of the units kept stay. The result has the
    shape and the type of ``weight``. Raises ``ValueError`` as ``select_units`` does.
    """
    matrix = _checked(weight, moments, units)
    columns = _columns(kept, matrix.shape[1] // units)
    fitted = np.zeros_like(matrix)
    fitted[:, columns] = matrix[:, columns]
    if moments.is_full:
        moment = regularised(moments.second_moment[0])
        fitted[:, columns] = np.linalg.solve(moment[np.ix_(columns, columns)], moment[columns] @ matrix.T).T
    return fitted.astype(weight.dtype).reshape(weight.shape)


def take_units(weight: Array, units: int, kept: Array) -> Array:
    """Return a canonical weight without the inputs of all units but ``kept``: ``(O, I / units * len(kept), *kernel)``.

    The units are whole channels, or parts of a matrix's columns where channels were flattened.
    """
    return weight.reshape(weight.shape[0], units, -1)[:, kept].reshape(weight.shape[0], -1, *weight.shape[2:])


def _checked(weight: Array, moments: Moments, units: int) -> Array:
    matrix = weight.reshape(weight.shape[0], -1).astype(np.float64)
    if moments.second_moment.shape[0] != 1:
        raise ValueError("units are chosen for an ungrouped layer")
    if matrix.shape[1] % units:
        raise ValueError(f"{units} units do not divide {matrix.shape[1]} inputs")
    return matrix


def _columns(kept: Array, block: int) -> Array:
    return (np.asarray(kept)[:, None] * block + np.arange(block)).reshape(-1)


def _eliminated(matrix: Array, moment: Array, units: int, count: int) -> Array:
    """Remove units until ``count`` are left.

    Updating the whole inverse for every unit would be slow. Instead a batch of units is removed with the inverse of a
    few candidates alone, those that are cheapest to remove at the moment, which is exact for them; the others follow
    in one product.
    """
    block = matrix.shape[1] // units
    if matrix.shape[0] > matrix.shape[1]:
        matrix = np.asarray(np.linalg.qr(matrix, mode="r"))  # as good: only W^T W matters
    inverse, alive = np.linalg.inv(moment), np.arange(units)
    while len(alive) > count:
        batch = min(len(alive) - count, max(1, int(_BATCH_SHARE * len(alive))))
        cheapest = np.argsort(_costs(matrix, inverse, block), kind="stable")[: _CANDIDATES * batch]
        candidates = np.sort(cheapest)
        columns = _columns(candidates, block)
        chosen = candidates[_cheapest(matrix[:, columns], inverse[np.ix_(columns, columns)], block, batch)]
        rest = np.setdiff1d(np.arange(len(alive)), chosen)
        matrix, inverse = _without(matrix, inverse, _columns(chosen, block), _columns(rest, block))
        alive = alive[rest]
    return alive


def _cheapest(matrix: Array, inverse: Array, block: int, count: int) -> list[int]:
    """Return ``count`` units, found one after the other."""
    alive = np.arange(matrix.shape[1] // block)
    chosen: list[int] = []
    while len(chosen) < count:
        worst = int(np.argmin(_costs(matrix, inverse, block)))
        rest = np.delete(np.arange(len(alive)), worst)
        matrix, inverse = _without(matrix, inverse, _columns(np.array([worst]), block), _columns(rest, block))
        chosen.append(int(alive[worst]))
        alive = alive[rest]
    return chosen


def _costs(matrix: Array, inverse: Array, block: int) -> Array:
    """Return what removing each unit costs: ``tr(W_R (H_RR)^-1 W_R^T)``."""
    units = matrix.shape[1] // block
    places = np.arange(units)
    own = inverse.reshape(units, block, units, block)[places, :, places]
    read = matrix.reshape(-1, units, block).transpose(1, 2, 0)
    return np.asarray(np.sum(read * np.linalg.solve(own, read), axis=(1, 2)))


def _without(matrix: Array, inverse: Array, gone: Array, rest: Array) -> tuple[Array, Array]:
    """Return the fitted weight and the inverse moment of the inputs ``rest`` once ``gone`` are removed."""
    step = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[np.ix_(gone, rest)])
    kept = inverse[np.ix_(rest, rest)] - inverse[np.ix_(rest, gone)] @ step
    return matrix[:, rest] - matrix[:, gone] @ step, kept
