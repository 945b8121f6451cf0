"""Find few values for what holds a layer, its weight or its factors, by the error of the layer's output. numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.forms import Clustered, Grid
from edgecompress.factorize.factors import Form, Grouped, factors, features, first_columns, with_factors
from edgecompress.factorize.forms import Spectral
from edgecompress.moments import Moments, regularised

Array = NDArray[Any]
_F = TypeVar("_F", bound=Form)

Values = Clustered | Grid
"""A weight or a factor of few values."""

Assign = Callable[[Array, Moments | None], Values]
"""Gives the few values of a canonical weight or factor ``(rows, ..)``, with the moments of what it multiplies."""


def reshaped(values: Values, shape: tuple[int, ...]) -> Values:
    """Return the same values in another shape."""
    if isinstance(values, Clustered):
        return replace(values, indices=values.indices.reshape(shape))
    return replace(values, codes=values.codes.reshape(shape))


def quantise_form(
    form: Form, target: Array, moments: Moments | None, assign: Assign, *, pays_off: Callable[[Array], bool]
) -> tuple[Form, tuple[Values | None, ...]]:
    """Return the form that few values make of the factors of ``form``, and these; None for a factor too small for them.

    In the order of application; the last factor is solved again for what the others became, so that it makes up for
    their errors, and is judged by what really flows into it. ``target`` is the canonical weight that the form stands
    for. Without a full moment every factor counts by itself.
    """
    if isinstance(form, Grouped | Spectral) or moments is None or not moments.is_full:
        alone = tuple(assign(factor, None) if pays_off(factor) else None for factor in factors(form))
        return _with_values(form, factors(form), alone), alone
    moment = moments.second_moment[0]
    *others, last = factors(form)
    found: list[Values | None] = []
    for place, factor in enumerate(others):
        entering = _entering(first_columns(form, moment)) if place == 0 else None
        found.append(assign(factor, entering) if pays_off(factor) else None)
    form = _with_values(form, factors(form), [*found, None])
    mapping = features(form)
    last = _solved_again(last, target, regularised(moment), mapping)
    flat = last.reshape(len(last), -1)
    values = assign(flat, _entering(mapping @ moment @ mapping.T)) if pays_off(last) else None
    found.append(None if values is None else reshaped(values, last.shape))
    return _with_values(form, [*factors(form)[:-1], last], found), tuple(found)


def _entering(moment: Array) -> Moments:
    return Moments("", moment[None], 1)


def _with_values(form: _F, arrays: Sequence[Array], values: Sequence[Values | None]) -> _F:
    """Return a form of ``arrays``, those in whose place there are values made of these."""
    pairs = zip(arrays, values, strict=True)
    return cast("_F", with_factors(form, [array if own is None else own.to_dense() for array, own in pairs]))


def _solved_again(last: Array, target: Array, moment: Array, mapping: Array) -> Array:
    """Return the last factor that is best for the features ``mapping @ x``, by least squares."""
    inner = mapping @ moment @ mapping.T
    safe = inner + (1e-6 * float(np.trace(inner)) / len(inner) + np.finfo(np.float64).tiny) * np.eye(len(inner))
    crossed = target.reshape(len(target), -1).astype(np.float64) @ moment @ mapping.T
    return np.asarray(np.linalg.solve(safe, crossed.T).T.reshape(last.shape), last.dtype)
