"""Which rank: for a share of the parameters, for a share of the energy, by variational Bayes, and what each rank would cost."""

from __future__ import annotations

from collections.abc import Sequence
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
    Spectral,
    Tucker2,
    count_parameters,
)
from edgecompress.factorize.separable import separable
from edgecompress.factorize.spectral import block_errors, spectral
from edgecompress.factorize.svd import calibrated_svd, plain_svd
from edgecompress.factorize.tucker import input_low_rank, tucker2
from edgecompress.moments import Moments, regularised

Array = NDArray[Any]
Form = LowRank | InputLowRank | Separable | Tucker2 | CP | Spectral


def max_ranks(form: FormName, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks beyond which nothing is gained (``cp``: a bound)."""
    outputs, channels, kernel = shape[0], shape[1], shape[2:]
    points = int(np.prod(kernel, dtype=np.int64))
    if form == "svd":
        return (min(outputs, channels * points),)
    if form == "svd_in":
        return (min(channels, outputs * points),)
    if form == "separable":
        return (min(channels * kernel[0], outputs * kernel[1]),)
    if form == "cp":
        return (outputs * channels * points // max(shape),)
    if form == "tucker2":
        return (min(outputs, channels * points), min(channels, outputs * points))
    return (outputs, channels * points)


def ranks_for_share(form: FormName, shape: tuple[int, ...], share: float) -> tuple[int, ...]:
    """Return the largest ranks whose form stores at most ``share`` of the parameters; at least 1, at most ``max_ranks``.

    Two ranks keep the proportion of their limits as nearly as whole numbers allow.
    """
    budget = share * float(np.prod(shape, dtype=np.int64)) + 1e-9
    limits = max_ranks(form, shape)
    low, high = 0.0, 1.0
    for _ in range(40):  # bisection on the common proportion; 40 halvings tell any two whole ranks apart
        middle = (low + high) / 2
        ranks = tuple(max(1, int(middle * limit)) for limit in limits)
        low, high = (middle, high) if count_parameters(form, shape, ranks) <= budget else (low, middle)
    ranks = tuple(max(1, int(low * limit)) for limit in limits)
    for axis in sorted(range(len(limits)), key=lambda axis: limits[axis]):
        while ranks[axis] < limits[axis]:
            larger = (*ranks[:axis], ranks[axis] + 1, *ranks[axis + 1 :])
            if count_parameters(form, shape, larger) > budget:
                break
            ranks = larger
    return ranks
