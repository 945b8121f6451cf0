"""One entry to all factorized forms: which there are, how to find one, and which is best for a weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.rank import Form, evbmf_rank, rank_for_energy, ranks_for_share, solve, supported
from edgecompress.factorize.sizes import FormName, count_parameters, fits
from edgecompress.factorize.svd import calibrated_svd, spectrum
from edgecompress.moments import Moments, output_errors

Array = NDArray[Any]
Ranks = tuple[int, ...]


FORM_NAMES: tuple[FormName, ...] = ("svd", "svd_in", "separable", "tucker2", "cp")
"""The forms that the rewriter can write."""


def solve_layer(form: FormName, weight: Array, ranks: Ranks, moments: Moments | None) -> Form:
    """Return ``form`` of a canonical weight: calibrated where there is a full moment (for svd, its diagonal will do).

    Raises ``ValueError`` for a form or ranks that the weight's shape does not allow.
    """
    if form == "svd" and moments is not None:
        return calibrated_svd(weight, ranks[0], moments)
    moment = moments.second_moment[0] if moments is not None and moments.is_full else None
    return solve(form, weight, ranks, moment)


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
            _, error = output_errors(weight, solve_layer(form, weight, ranks, moments).to_dense(), judged)
            found.append((error, form, ranks))
    if not found:
        return None
    _, form, ranks = min(found)
    return form, ranks


def spectral_rank(weight: Array, *, energy: float | None) -> int:
    """Return the rank of a weight seen as a matrix that holds the share ``energy``; without one EVBMF's, maybe 0."""
    if energy is None:
        return evbmf_rank(weight.reshape(weight.shape[0], -1))
    return rank_for_energy(spectrum(weight), energy)


def allowed_ranks(form: FormName, shape: tuple[int, ...], rank: int) -> Ranks:
    """Return the ranks nearest to ``rank`` in every mode that a weight of ``shape`` allows."""
    return supported(form, shape, (rank, rank) if form == "tucker2" else (rank,))


def _white(weight: Array) -> Moments:
    return Moments("", np.ones((1, weight.size // weight.shape[0])), 1)
