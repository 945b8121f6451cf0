"""Which rank: for a share of the parameters or of the energy, or by variational Bayes; and the solvers by form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.cp import cp
from edgecompress.factorize.separable import separable
from edgecompress.factorize.sizes import FormName, count_parameters, dense_parameters
from edgecompress.factorize.spectral import spectral
from edgecompress.factorize.svd import calibrated_svd, plain_svd
from edgecompress.factorize.tucker import input_low_rank, tucker2
from edgecompress.moments import Moments

if TYPE_CHECKING:
    from edgecompress.factorize.factors import Form
    from edgecompress.factorize.forms import LowRank

Array = NDArray[Any]


def max_ranks(form: FormName, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ranks beyond which nothing is gained (``cp``: a bound)."""
    outputs, channels, kernel = shape[0], shape[1], shape[2:]
    points = int(np.prod(kernel, dtype=np.int64))
    if form in ("svd", "svd_bias"):
        return (min(outputs, channels * points + (form == "svd_bias")),)
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
    """Return the largest ranks whose form stores at most ``share`` of the parameters, as far as ``supported``.

    Two ranks keep the proportion of their limits as nearly as whole numbers allow.
    """
    budget = share * dense_parameters(form, shape) + 1e-9
    limits = max_ranks(form, shape)

    def allowed(ranks: tuple[int, ...]) -> bool:
        return count_parameters(form, shape, ranks) <= budget and ranks == supported(form, shape, ranks)

    low, high = 0.0, 1.0
    for _ in range(40):  # bisection on the common proportion; 40 halvings tell any two whole ranks apart
        middle = (low + high) / 2
        ranks = supported(form, shape, tuple(int(middle * limit) for limit in limits))
        low, high = (middle, high) if count_parameters(form, shape, ranks) <= budget else (low, middle)
    ranks = supported(form, shape, tuple(int(low * limit) for limit in limits))
    for axis in sorted(range(len(limits)), key=lambda axis: limits[axis]):
        while allowed(larger := (*ranks[:axis], ranks[axis] + 1, *ranks[axis + 1 :])):
            ranks = larger
    return ranks


def supported(form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """Return ``ranks`` within ``1 .. max_ranks``; those of ``tucker2`` each at most the other times the kernel."""
    ranks = tuple(min(max(1, rank), limit) for rank, limit in zip(ranks, max_ranks(form, shape), strict=True))
    if form == "tucker2":
        points = int(np.prod(shape[2:], dtype=np.int64))
        return min(ranks[0], ranks[1] * points), min(ranks[1], ranks[0] * points)
    return ranks


def aligned_ranks(form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    """Return ranks that are multiples of ``multiple``: the next below, or the first one where there is none below.

    Kernels take so many channels at once, and a rank in between costs as much time as the next multiple. Left as they
    are: the full rank of a mode, blocks of ``spectral``, which are no channels, and ranks of which the first multiple
    would save nothing.
    """
    if form == "spectral":
        return ranks
    limits = max_ranks(form, shape)
    wanted = (
        rank if rank >= limit else max(rank // multiple, 1) * multiple
        for rank, limit in zip(ranks, limits, strict=True)
    )
    aligned = supported(form, shape, tuple(wanted))
    smaller = count_parameters(form, shape, aligned) < dense_parameters(form, shape)
    return aligned if smaller else ranks


def rank_for_energy(singular_values: Array, share: float) -> int:
    """Return the smallest rank whose singular values hold at least ``share`` of the sum of squares, at least 1."""
    energy = np.cumsum(np.asarray(singular_values, np.float64) ** 2)
    return min(len(energy), 1 + int(np.sum(energy < share * energy[-1] * (1.0 - 1e-12))))


def evbmf_rank(matrix: Array) -> int:
    """Return the rank that empirical variational Bayes gives a matrix whose noise variance is unknown.

    The analytic global solution of Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of
    fully-observed variational Bayesian matrix factorization", JMLR 14, 2013: a component is kept where its singular
    value exceeds ``sqrt(M s x)`` (the threshold of the empirical Bayes solution), with the noise variance ``s`` that
    minimises the free energy within the bounds of the theorem on unknown noise. For ``L x M``, ``L <= M``, the result
    is below ``L / (1 + L / M)``, and 0 where nothing stands out of noise: then the matrix should keep its full rank.
    """
    values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    if not values.any():
        return 0
    rows, columns = sorted(matrix.shape)
    values = np.maximum(values, np.finfo(np.float64).eps * values[0])  # without noise the logarithm stays finite
    squares = values**2 / columns
    ratio = rows / columns
    edge = _edge(ratio)
    most = min(rows, int(np.ceil(rows / (1.0 + ratio))) - 1)
    lowest = float(np.mean(squares[most:]))
    if most < rows:
        lowest = max(lowest, float(squares[most]) / edge)
    highest = float(np.mean(squares))

    def energy(logarithms: Array) -> Array:
        return _free_energy(squares, np.exp(logarithms), ratio, edge)

    noise = np.exp(_minimise(energy, float(np.log(lowest)), float(np.log(highest))))
    return int(np.sum(squares > noise * edge))


def _edge(ratio: float) -> float:
    """Return the squared singular value, over ``M`` times the noise, above which a component is kept.

    ``(1 + t)(1 + ratio / t)`` for the root ``t`` of ``f(t) + f(t / ratio) = 0``, ``f(z) = log(1 + z) / z - 1 / 2``,
    which falls.
    """
    low, high = 1e-12, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        balance = np.log1p(middle) / middle + ratio * np.log1p(middle / ratio) / middle - 1.0
        low, high = (middle, high) if balance > 0 else (low, middle)
    root = (low + high) / 2
    return float((1.0 + root) * (1.0 + ratio / root))


def _free_energy(squares: Array, noise: Array, ratio: float, edge: float) -> Array:
    """Return the free energy, up to constants, for every candidate noise variance; ``squares`` are ``g^2 / M``."""
    x = squares[None, :] / noise[:, None]
    kept = x > edge
    half = np.where(kept, x, edge) - (1.0 + ratio)
    tau = (half + np.sqrt(np.maximum(half**2 - 4.0 * ratio, 0.0))) / 2.0
    gain = np.log1p(tau) + ratio * np.log1p(tau / ratio) - tau
    return np.asarray(np.sum(x - np.log(x) + np.where(kept, gain, 0.0), axis=1))


def _minimise(function: Callable[[Array], Array], low: float, high: float) -> float:
    """Return where a function of one variable is least: the best point of a grid, refined by golden sections."""
    grid = np.linspace(low, high, 257)
    best = int(np.argmin(function(grid)))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    for _ in range(60):
        inner = np.array([high - golden * (high - low), low + golden * (high - low)])
        left, right = function(inner)
        low, high = (low, float(inner[1])) if left <= right else (float(inner[0]), high)
    return (low + high) / 2


def solve(form: FormName, weight: Array, ranks: tuple[int, ...], moment: Array | None = None, **options: int) -> Form:
    """Return a form of a canonical weight: under ``regularised(moment)``, or plain without a ``(d, d)`` moment.

    ``options`` go to the solver (``rounds`` of those that alternate). Raises ``ValueError`` for ranks out of range, and
    for ``svd_bias``, which needs the bias, too: ``affine_svd``.
    """
    if form == "svd_bias":
        raise ValueError("svd_bias is not a form of a weight alone")
    return _SOLVERS[form](weight, ranks, moment, **options)


def _low_rank(weight: Array, rank: int, moment: Array | None) -> LowRank:
    return plain_svd(weight, rank) if moment is None else calibrated_svd(weight, rank, Moments("", moment[None], 1))


_SOLVERS: dict[str, Callable[..., Form]] = {
    "svd": lambda weight, ranks, moment, **_: _low_rank(weight, ranks[0], moment),
    "svd_in": lambda weight, ranks, moment, **options: input_low_rank(weight, ranks[0], moment, **options),
    "separable": lambda weight, ranks, moment, **options: separable(weight, ranks[0], moment, **options),
    "tucker2": tucker2,
    "cp": lambda weight, ranks, moment, **options: cp(weight, ranks[0], moment, **options),
    "spectral": lambda weight, ranks, moment, **_: spectral(weight, ranks, moment),
}
