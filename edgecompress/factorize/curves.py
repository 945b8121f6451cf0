"""What a form loses at each of many ranks, from a few solutions, which are kept: they serve to measure with, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.rank import solve
from edgecompress.factorize.sizes import FormName, count_parameters
from edgecompress.factorize.spectral import block_errors
from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]
Ranks = tuple[int, ...]

ROUNDS = 2
"""Rounds of alternation for a curve: on trained networks the error is then within 2 % of that after 40."""

_SMALLEST_ERROR = 1e-12


@dataclass(frozen=True)
class Curve:
    """The output error ``tr((W - V) C (W - V)^T)`` that a form leaves at each of ``ranks``, never rising.

    ``energy`` is ``tr(W C W^T)``; ``solved`` holds the approximations ``V`` that were solved for, canonical, by their
    place in ``ranks``.
    """

    form: FormName
    ranks: tuple[Ranks, ...]
    errors: Array
    energy: float
    solved: Mapping[int, Array]


def error_curve(
    form: FormName,
    weight: Array,
    ranks: Sequence[Ranks],
    moments: Moments | None,
    *,
    anchors: Sequence[int],
    groups: int = 1,
) -> Curve:
    """Return the errors of a form of a canonical weight ``(O, I / groups, *kernel)`` at ``ranks``, which rise in size.

    ``C`` is the regularised moment (its diagonal where that is all there is), or the identity. The form is solved, with
    ``ROUNDS`` of alternation, at the places ``anchors`` of ``ranks``, of which the first and the last are always some;
    between these the logarithm of the error is interpolated over the parameters. For ``svd`` and ``spectral`` all
    errors are exact.
    ``svd_bias`` counts as ``svd``, whose errors are near.
    """
    places = np.unique([0, *anchors, len(ranks) - 1])
    parts = np.split(weight, groups)
    weightings = _weightings(moments, groups, weight.size // len(weight))
    form_solved: FormName = "svd" if form == "svd_bias" else form
    known = [None] * groups if moments is None or not moments.is_full else list(moments.second_moment)
    pieces = [
        _solved(form_solved, part, ranks, places, weighting=weighting, moment=own)
        for part, weighting, own in zip(parts, weightings, known, strict=True)
    ]
    energy = sum(_error(part, own) for part, own in zip(parts, weightings, strict=True))
    errors = np.sum([each for each, _ in pieces], axis=0)
    floor = _SMALLEST_ERROR * energy + np.finfo(np.float64).tiny
    if len(errors) < len(ranks):
        sizes = [count_parameters(form, parts[0].shape, entry) for entry in ranks]
        logs = np.log(np.minimum.accumulate(np.maximum(errors, floor)))
        errors = np.exp(np.interp(sizes, np.array(sizes)[places], logs))
    dense = zip(*(each for _, each in pieces), strict=True)
    solved = {int(place): np.concatenate(found) for place, found in zip(places, dense, strict=True)}
    return Curve(form, tuple(ranks), np.minimum.accumulate(np.maximum(errors, floor)), energy, solved)


def _weightings(moments: Moments | None, groups: int, width: int) -> list[Array]:
    """Return, per group, the regularised moment ``(d, d)``, or what is known or assumed of its diagonal ``(d,)``."""
    if moments is None:
        return [np.ones(width)] * groups
    return [regularised(own) if own.ndim == 2 else regularised_diagonal(own) for own in moments.second_moment]


def _solved(
    form: FormName, weight: Array, ranks: Sequence[Ranks], places: Array, *, weighting: Array, moment: Array | None
) -> tuple[Array, list[Array]]:
    """Return the errors (at ``places``; at all ranks where that costs no more) and the approximations at ``places``.

    ``weight`` is that of one group; ``moment`` is what the solvers take: they regularise it.
    """
    if form == "svd":
        return _solved_svd(weight, ranks, places, weighting)
    forms = [solve(form, weight, ranks[place], moment, rounds=ROUNDS) for place in places]
    dense = [each.to_dense().astype(weight.dtype) for each in forms]
    if form == "spectral" and (moment is not None or (weighting == 1.0).all()):
        blocks = block_errors(weight, moment)
        return np.array([blocks[p - 1, q - 1] for p, q in ranks]), dense
    return np.array([_error(weight - each, weighting) for each in dense]), dense


def _solved_svd(weight: Array, ranks: Sequence[Ranks], places: Array, weighting: Array) -> tuple[Array, list[Array]]:
    """Solve all ranks at once: the best of rank r is ``U U^T W``, ``U`` the r leading eigenvectors of ``W C W^T``."""
    flat = _rows(weight)
    values, vectors = np.linalg.eigh(_weighed(flat, weighting) @ flat.T)
    left = np.cumsum(np.maximum(values, 0.0))
    errors = np.array([left[-1 - rank] if rank < len(left) else 0.0 for (rank,) in ranks])
    bases = [vectors[:, ::-1][:, : ranks[place][0]] for place in places]
    return errors, [(basis @ (basis.T @ flat)).reshape(weight.shape).astype(weight.dtype) for basis in bases]


def _rows(weight: Array) -> Array:
    return weight.reshape(len(weight), -1).astype(np.float64)


def _weighed(rows: Array, weighting: Array) -> Array:
    return np.asarray(rows @ weighting if weighting.ndim == 2 else rows * weighting)


def _error(wrong: Array, weighting: Array) -> float:
    rows = _rows(wrong)
    return float(np.sum(_weighed(rows, weighting) * rows))
