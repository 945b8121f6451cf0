"""Calibrated assignment: what a weight loses when it is rounded is made up for by those not yet rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]

Rule = Callable[[Array], Array]
"""Gives every wanted value the allowed value that takes its place, element by element. Arrays have the shape
``(.., groups, C_out / groups)``, with which what differs by output channel broadcasts."""

_BLOCK = 64
_DAMPINGS = 0.01, 0.1, 1.0, 10.0


@dataclass(frozen=True)
class Elimination:
    """In which order inputs are rounded, and how an error in one is made up for by the later ones.

    ``C = (I + F) diag(energies) (I + F)^T`` in that order, with ``C`` the damped second moment and ``F`` strictly upper
    triangular. With errors ``E`` of the weights rounded so far, column ``j`` aims at ``w_j + E f_j``, and what it then
    misses adds ``energies[j]`` times its square to ``tr(E C E^T)``: the sum over all columns is exactly the whole.

    Shapes:
        order: ``(groups, d)``, which input comes when
        energies: ``(groups, d)``, by place in the order, float64
        feedback: ``(groups, d, d)``, the transpose of ``F`` by place in the order; ``None`` where only the diagonal of
            the second moment is known
    """

    order: NDArray[np.intp]
    energies: Array
    feedback: Array | None


def eliminate(moments: Moments, kind: type[np.floating[Any]] = np.float32) -> Elimination:
    """Return the elimination of a layer's inputs in the order of falling mean square.

    The same as the feedback of Frantar et al. 2022 (GPTQ) by the Cholesky factor of the inverse moment, without the
    inverse (Chee et al. 2023, theorem 6). Damped by 1 % of the mean diagonal, more where the moment is indefinite from
    rounding. ``kind`` is the precision of ``feedback``; the factor is computed in float64.
    """
    diagonal = moments.diagonal
    order = np.argsort(-diagonal, axis=1, kind="stable")
    if not moments.is_full:
        energies = np.stack([regularised_diagonal(each) for each in diagonal])
        return Elimination(order, np.take_along_axis(energies, order, axis=1), None)
    groups, width = order.shape
    energies = np.empty((groups, width))
    feedback = np.empty((groups, width, width), dtype=kind)
    for group, places in enumerate(order):
        # taken from the last to the first, so that a lower factor is what an upper one is in the order
        factor = _factor(moments.second_moment[group], places[::-1])
        pivots = np.diagonal(factor).copy()
        energies[group] = pivots[::-1] ** 2
        factor /= pivots
        feedback[group] = factor.T[::-1, ::-1]
    return Elimination(order, energies, feedback)


def _factor(second_moment: Array, places: Array) -> Array:
    """Return the lower Cholesky factor of the damped moment, its inputs in the order ``places``."""
    for damping in _DAMPINGS:
        try:
            return np.linalg.cholesky(regularised(second_moment, damping)[np.ix_(places, places)])
        except np.linalg.LinAlgError:
            continue
    raise ValueError("the second moment is none: it is far from positive semidefinite")


def assign(weight: Array, elimination: Elimination, rule: Rule, keep: Array | None = None) -> Array:
    """Return the values that take the place of ``weight``, chosen by ``rule`` column by column with feedback.

    Blocked: what whole blocks of columns add to later ones is one matrix product each.

    Args:
        weight: ``(C_out, d)`` or canonical ``(C_out, C_in / groups, *kernel)``.
        elimination: of the layer's inputs.
        rule: see ``Rule``.
        keep: of the weight's shape; where it is false the value is exactly zero, whatever the rule says.
    """
    wanted = _in_order(weight, elimination)
    kept = None if keep is None else _in_order(keep, elimination)
    if elimination.feedback is None:
        chosen = rule(wanted)
        return _back(chosen if kept is None else np.where(kept, chosen, 0), elimination, weight)
    original, missed = wanted.copy(), np.empty_like(wanted)
    width = len(wanted)
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        wanted[start:stop] += _made_up(elimination.feedback[:, start:stop, :start], missed[:start])
        inner = np.ascontiguousarray(elimination.feedback[:, start:stop, start:stop])
        for place in range(start, stop):
            wanted[place] += _made_up(
                inner[:, place - start : place - start + 1, : place - start], missed[start:place]
            )[0]
            chosen = rule(wanted[place])
            wanted[place] = chosen if kept is None else np.where(kept[place], chosen, 0)
            missed[place] = original[place] - wanted[place]
    return _back(wanted, elimination, weight)


def _made_up(feedback: Array, missed: Array) -> Array:
    """Return what errors ``(before, groups, O)`` add to the columns of ``feedback``, ``(groups, columns, before)``."""
    return np.asarray(np.matmul(feedback, missed.swapaxes(0, 1)).swapaxes(0, 1))


def _in_order(values: Array, elimination: Elimination) -> Array:
    """Return values of a weight's shape as ``(d, groups, O)`` in the order of elimination; floats at least float32."""
    groups, width = elimination.order.shape
    rows = np.moveaxis(values.reshape(groups, -1, width), 2, 0)
    found = np.take_along_axis(rows, elimination.order.T[:, :, None], axis=0)
    return found if values.dtype == np.bool_ else found.astype(np.promote_types(values.dtype, np.float32))


def _back(values: Array, elimination: Elimination, weight: Array) -> Array:
    """Undo ``_in_order``, in the shape and type of ``weight``."""
    rows = np.empty_like(values)
    np.put_along_axis(rows, elimination.order.T[:, :, None], values, axis=0)
    return np.moveaxis(rows, 0, 2).reshape(weight.shape).astype(weight.dtype)
