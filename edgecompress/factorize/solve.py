"""One entry to all factorized forms: which there are, how to find one, and which is best for a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.cp import cp
from edgecompress.factorize.forms import (
    CP,
    FormName,
    InputLowRank,
    LowRank,
    Separable,
    Tucker2,
    count_parameters,
    fits,
)
from edgecompress.factorize.rank import ranks_for_share, supported
from edgecompress.factorize.separable import separable
from edgecompress.factorize.svd import calibrated_svd, plain_svd
from edgecompress.factorize.tucker import input_low_rank, tucker2
from edgecompress.moments import Moments, output_errors

Array = NDArray[Any]
Form = LowRank | InputLowRank | Separable | Tucker2 | CP
Ranks = tuple[int, ...]


def _svd(weight: Array, ranks: Ranks, moments: Moments | None) -> Form:
    return plain_svd(weight, ranks[0]) if moments is None else calibrated_svd(weight, ranks[0], moments)


_SOLVERS: dict[FormName, Callable[[Array, Ranks, Moments | None], Form]] = {
    "svd": _svd,
    "svd_in": lambda weight, ranks, moments: input_low_rank(weight, ranks[0], _matrix(moments)),
    "separable": lambda weight, ranks, moments: separable(weight, ranks[0], _matrix(moments)),
    "tucker2": lambda weight, ranks, moments: tucker2(weight, (ranks[0], ranks[1]), _matrix(moments)),
    "cp": lambda weight, ranks, moments: cp(weight, ranks[0], _matrix(moments)),
}

FORM_NAMES: tuple[FormName, ...] = tuple(_SOLVERS)


def solve(form: FormName, weight: Array, ranks: Ranks, moments: Moments | None) -> Form:
    """Return ``form`` of a canonical weight: calibrated where there is a full moment (for svd, its diagonal will do).

    Raises ``ValueError`` for a form or ranks that the weight's shape does not allow.
    """
    return _SOLVERS[form](weight, ranks, moments)


def best_form(weight: Array, share: float, moments: Moments | None) -> tuple[FormName, Ranks] | None:
    """Return the form and ranks that keep at most ``share`` of the parameters at the least output error.

    All forms that the shape allows are solved; ``None`` where none is smaller than the weight. Without moments the
    error is that of the weight.
    """
    judged = moments if moments is not None else _white(weight)
    found: list[tuple[float, FormName, Ranks]] = []
    for form in FORM_NAMES:
        ranks = ranks_for_share(form, weight.shape, share) if fits(form, weight.shape) else ()
        if ranks and count_parameters(form, weight.shape, ranks) < weight.size:
            _, error = output_errors(weight, solve(form, weight, ranks, moments).to_dense(), judged)
            found.append((error, form, ranks))
    if not found:
        return None
    _, form, ranks = min(found)
    return form, ranks


def allowed_ranks(form: FormName, shape: tuple[int, ...], rank: int) -> Ranks:
    """Return the ranks nearest to ``rank`` in every mode that a weight of ``shape`` allows."""
    return supported(form, shape, (rank, rank) if form == "tucker2" else (rank,))


def _matrix(moments: Moments | None) -> Array | None:
    return np.asarray(moments.second_moment[0]) if moments is not None and moments.is_full else None


def _white(weight: Array) -> Moments:
    return Moments("", np.ones((1, weight.size // weight.shape[0])), 1)
