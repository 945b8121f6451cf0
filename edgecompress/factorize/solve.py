"""One entry to all factorized forms: which there are, how to find one, and which is best for a weight."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.factors import ChannelForm, Form, Grouped
from edgecompress.factorize.forms import AffineLowRank, Spectral
from edgecompress.factorize.rank import evbmf_rank, max_ranks, rank_for_energy, ranks_for_share, solve, supported
from edgecompress.factorize.sizes import FormName, count_parameters, fits
from edgecompress.factorize.svd import affine_svd, calibrated_svd, spectrum
from edgecompress.moments import Moments, output_errors

Array = NDArray[Any]
Ranks = tuple[int, ...]


FORM_NAMES: tuple[FormName, ...] = ("svd", "svd_bias", "svd_in", "separable", "tucker2", "cp", "spectral")
"""The forms that the rewriter can write."""

AUTO_FORMS: tuple[FormName, ...] = ("svd", "svd_in", "separable", "tucker2")
"""The forms that ``best_form`` tries. Left to those who name them: spectral saves no work; the depthwise steps of cp
run 1.6 to 1.9 times slower than the layer they replace; svd_bias uses up the bias that could be corrected later."""


def solve_layer(
    form: FormName,
    weight: Array,
    ranks: Ranks,
    moments: Moments | None,
    *,
    groups: int = 1,
    bias: Array | None = None,
) -> Form:
    """Return ``form`` of a canonical weight: calibrated where there is a full moment (for svd, its diagonal will do).

    ``groups`` are those of a convolution with a weight ``(O, I / groups, *kernel)``, every one of which is solved with
    these ranks under its own moment; ``bias`` ``(O,)`` is the layer's, for ``svd_bias``. Raises ``ValueError`` for a
    form or ranks that the weight's shape does not allow, and for ``svd_bias`` without a bias.
    """
    if groups > 1:
        return _grouped(form, weight, ranks, moments, groups)
    if form == "svd_bias":
        if bias is None:
            raise ValueError("svd_bias needs the bias of the layer")
        return affine_svd(weight, bias, ranks[0], moments)
    if form == "svd" and moments is not None:
        return calibrated_svd(weight, ranks[0], moments)
    moment = moments.second_moment[0] if moments is not None and moments.is_full else None
    return solve(form, weight, ranks, moment)


def _grouped(form: FormName, weight: Array, ranks: Ranks, moments: Moments | None, groups: int) -> Grouped:
    """Solve every group by itself."""
    known = [None] * groups if moments is None else [_of_group(moments, group) for group in range(groups)]
    parts = [solve_layer(form, part, ranks, own) for part, own in zip(np.split(weight, groups), known, strict=True)]
    if any(isinstance(part, Spectral | AffineLowRank | Grouped) for part in parts):
        raise ValueError(f"{form} is not a form of groups")
    return Grouped(cast("tuple[ChannelForm, ...]", tuple(parts)))


def _of_group(moments: Moments, group: int) -> Moments:
    place = slice(group, group + 1)
    mean = None if moments.mean is None else moments.mean[place]
    return Moments(moments.layer, moments.second_moment[place], moments.count, mean)


def best_form(
    weight: Array, share: float, moments: Moments | None, *, groups: int = 1
) -> tuple[FormName, Ranks, float] | None:
    """Return the form and ranks that keep at most ``share`` of the parameters at the least output error, and that.

    The error is that of the layer's output over its energy; without moments it is that of the weight. All of
    ``AUTO_FORMS`` that the shape allows are solved; ``None`` where none is smaller than the weight.
    """
    shape = (weight.shape[0] // groups, *weight.shape[1:])
    judged = moments if moments is not None else _white(weight, groups)
    found: list[tuple[float, FormName, Ranks]] = []
    for form in AUTO_FORMS:
        ranks = ranks_for_share(form, shape, share) if fits(form, shape) else ()
        if ranks and groups * count_parameters(form, shape, ranks) < weight.size:
            solved = solve_layer(form, weight, ranks, moments, groups=groups)
            energy, error = output_errors(weight, solved.to_dense(), judged)
            found.append((error / energy if energy > 0 else 0.0, form, ranks))
    if not found:
        return None
    error, form, ranks = min(found)
    return form, ranks, error


def ranks_by_value(form: FormName, weight: Array, *, energy: float | None, groups: int = 1) -> Ranks | None:
    """Return the ranks of svd or tucker2 that hold the share ``energy``; without one those that EVBMF finds.

    Those of svd are of the weight as a matrix, those of tucker2 of its unfoldings along the outputs and the inputs
    (Kim et al. 2016). A mode in which EVBMF finds nothing keeps its full rank; ``None`` where it finds nothing at all.
    Of groups, the rank at which all of them together hold the share, and the largest that EVBMF finds.
    """
    parts = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    unfoldings = [parts.reshape(*parts.shape[:2], -1)]
    if form == "tucker2":
        unfoldings.append(parts.swapaxes(1, 2).reshape(groups, parts.shape[2], -1))
    found = tuple(_rank_by_value(matrices, energy) for matrices in unfoldings)
    if not any(found):
        return None
    shape = parts.shape[1:]
    return supported(
        form, shape, tuple(rank or limit for rank, limit in zip(found, max_ranks(form, shape), strict=True))
    )


def _rank_by_value(matrices: Array, energy: float | None) -> int:
    if energy is None:
        return max(evbmf_rank(matrix) for matrix in matrices)
    return rank_for_energy(np.sqrt(np.sum([spectrum(matrix) ** 2 for matrix in matrices], axis=0)), energy)


def allowed_ranks(form: FormName, shape: tuple[int, ...], rank: int) -> Ranks:
    """Return the ranks nearest to ``rank`` in every mode that a weight of ``shape`` allows."""
    return supported(form, shape, (rank,) * len(max_ranks(form, shape)))


def _white(weight: Array, groups: int) -> Moments:
    return Moments("", np.ones((groups, weight.size // weight.shape[0])), 1)
