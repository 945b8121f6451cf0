"""Canonical polyadic form of a kernel: 1 x 1, depthwise ``kh x 1``, depthwise ``1 x kw``, 1 x 1.

Alternation over the four factors; each is a linear least-squares problem under the second moment. A best CP
approximation need not exist: components may grow without bound and cancel (de Silva and Lim 2008). So the sum of
squares of all components is penalised lightly (Tikhonov; Phan et al. 2019 bound the same quantity): with the other
factors normalised, that is a plain ridge on the factor at hand, every step lowers the same objective, and the
components stay bounded.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import CP
from edgecompress.factorize.separable import descend
from edgecompress.moments import regularised

Array = NDArray[Any]

MAX_ROUNDS = 40
"""Rounds of alternation at most."""

TOLERANCE = 2e-3
"""A round that lowers the objective by less than this part of it is the last one."""

PENALTY = 1e-4
"""Weight of the components' energy against that of the error, in units of the mean square of the inputs."""

DEGENERATE = 100.0
"""A start whose components hold more than this times the energy of the weight cancels too much to be kept."""

_START_ROUNDS = 25
_LONGEST_REACH = 20.0
_GRADIENT_STEPS = 5


@dataclass(frozen=True)
class _Problem:
    """A weight ``(O, I, kh, kw)``, its moment ``(d, d)``, ``product = weight @ moment (O, d)`` and the ridge.

    ``traces`` hold, per input axis, two matrices whose Kronecker product is about the moment: along that axis, across
    the others.
    """

    weight: Array
    moment: Array | None
    product: Array
    ridge: float
    traces: tuple[tuple[Array, Array], ...]


# The factors in the order of the weight's axes, components first: (r, O), (r, I), (r, kh), (r, kw).
_Factors = Sequence[Array]


def cp(weight: Array, rank: int, moment: Array | None = None, *, rounds: int = MAX_ROUNDS) -> CP:
    """Return the CP form of a canonical weight ``(O, I, kh, kw)``.

    Starts from tensorly's alternating least squares on the weight, then alternates the factors under
    ``regularised(moment)``, or on the weight alone without a ``(d, d)`` moment. Never worse than the start, unless
    that is degenerate. Raises ``ValueError`` for a rank outside ``1 .. prod(shape) / max(shape)``, a weight that has
    not four axes, or a moment of the wrong size.
    """
    if weight.ndim != 4:
        raise ValueError(f"a CP form needs a weight (O, I, kh, kw), not {weight.shape}")
    limit = weight.size // max(weight.shape)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is outside 1 .. {limit}")
    wide = weight.astype(np.float64)
    if not wide.any():
        return _form(tuple(np.zeros((rank, size)) for size in weight.shape), weight)
    problem = _pose(wide, moment)
    start = _parafac(wide, rank)
    factors = _alternate(problem, start, rounds)
    if _energy(start) <= DEGENERATE * float(np.sum(wide**2)) and _error(problem, start) < _error(problem, factors):
        factors = start
    return _form(factors, weight)


def _pose(weight: Array, moment: Array | None) -> _Problem:
    outputs, size = len(weight), weight.size // len(weight)
    if moment is not None and moment.shape != (size, size):
        raise ValueError(f"the moment has shape {moment.shape}; the weight needs {(size, size)}")
    flat = weight.reshape(outputs, size)
    if moment is None:
        others = [size // length for length in weight.shape[1:]]
        traces = tuple((np.eye(length), np.eye(other)) for length, other in zip(weight.shape[1:], others, strict=True))
        return _Problem(weight, None, flat, PENALTY, traces)
    damped = regularised(moment.astype(np.float64))
    ridge = PENALTY * float(np.trace(damped)) / size
    traces = tuple(_traces(damped, weight.shape[1:], axis) for axis in range(3))
    return _Problem(weight, damped, flat @ damped, ridge, traces)


def _weighed(problem: _Problem, rows: Array) -> Array:
    """Return ``rows @ moment``; without a moment the identity is not multiplied by."""
    return rows if problem.moment is None else rows @ problem.moment


def _traces(moment: Array, shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """Return the moment averaged over all axes but one, and the moment over the others relative to its mean."""
    grid = np.moveaxis(moment.reshape(*shape, *shape), (axis, 3 + axis), (0, 3))
    split = grid.reshape(shape[axis], -1, shape[axis], len(moment) // shape[axis])
    across = np.einsum("xrxs->rs", split)
    return np.einsum("xryr->xy", split) / split.shape[1], across / (np.trace(across) / split.shape[1])


def _parafac(weight: Array, rank: int) -> _Factors:
    """Return tensorly's alternating least squares from singular vectors; its padding draws from a fixed seed.

    Where its systems are singular (components that start without overlap with the weight), it starts from random
    factors of a fixed seed instead, with a ridge.
    """
    from tensorly.decomposition import parafac

    options = {"n_iter_max": _START_ROUNDS, "random_state": 0}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # it warns that a kernel has fewer singular vectors than components
        try:
            _, factors = parafac(weight, rank, init="svd", **options)
            usable = all(np.isfinite(factor).all() for factor in factors)
        except np.linalg.LinAlgError:
            usable = False
        if not usable:
            _, factors = parafac(weight, rank, init="random", l2_reg=PENALTY * float(np.sum(weight**2)), **options)
    return tuple(np.asarray(factor).T for factor in factors)


def _alternate(problem: _Problem, start: _Factors, rounds: int) -> _Factors:
    """Return the factors after alternation, the objective falling from round to round.

    Alternation creeps along narrow valleys, so after every round the step is stretched (Bro 1998), further and further
    as long as that lowers the objective.
    """
    best, factors, reach = _objective(problem, start), start, 1.0
    for _ in range(rounds):
        candidate = _round(problem, factors)
        cost = _objective(problem, candidate)
        old, new = _balanced(factors), _balanced(candidate)
        stretched = tuple(to + reach * (to - since) for to, since in zip(new, old, strict=True))
        further = _objective(problem, stretched)
        if further < cost:
            candidate, cost, reach = stretched, further, min(1.5 * reach, _LONGEST_REACH)
        else:
            reach = max(reach / 2, 0.5)
        if not cost < best:
            break
        gain, best, factors = best - cost, cost, candidate
        if gain < TOLERANCE * best:
            break
    return factors


def _round(problem: _Problem, factors: _Factors) -> _Factors:
    """Solve for each factor in turn."""
    for axis in (2, 3, 1, 0):
        ready = list(_scale_in(factors, axis))
        ready[axis] = _solve_inner(problem, ready, axis) if axis else _solve_out(problem, ready)
        factors = tuple(ready)
    return factors


def _scale_in(factors: _Factors, axis: int) -> _Factors:
    """Scale all factors but one to unit norm per component; that one takes the scale."""
    norms = [np.linalg.norm(factor, axis=1, keepdims=True) for factor in factors]
    units = [factor / np.where(norm > 0, norm, 1.0) for factor, norm in zip(factors, norms, strict=True)]
    units[axis] = units[axis] * np.prod(norms, axis=0)
    return tuple(units)


def _balanced(factors: _Factors) -> _Factors:
    """Give all factors the same norm per component, and the largest entry of each but the output's a positive sign."""
    norms = [np.linalg.norm(factor, axis=1, keepdims=True) for factor in factors]
    scale = np.prod(norms, axis=0) ** (1.0 / len(factors))
    parts = [factor * (scale / np.where(norm > 0, norm, 1.0)) for factor, norm in zip(factors, norms, strict=True)]
    for axis in range(1, len(parts)):
        strongest = np.take_along_axis(parts[axis], np.argmax(np.abs(parts[axis]), axis=1)[:, None], axis=1)
        signs = np.where(strongest < 0, -1.0, 1.0)
        parts[axis], parts[0] = parts[axis] * signs, parts[0] * signs
    return tuple(parts)


def _rows(factors: _Factors) -> Array:
    """Return every component's kernel ``(r, I kh kw)``, without the output factor."""
    _, channels, vertical, horizontal = factors
    grid = np.einsum("ri,ra,rb->riab", channels, vertical, horizontal)
    return np.asarray(grid.reshape(len(channels), -1))


def _solve_out(problem: _Problem, factors: _Factors) -> Array:
    rows = _rows(factors)
    matrix = _weighed(problem, rows) @ rows.T
    return np.asarray(np.linalg.solve(matrix + problem.ridge * np.eye(len(rows)), rows @ problem.product.T))


def _solve_inner(problem: _Problem, factors: _Factors, axis: int) -> Array:
    """Return a better factor of one input axis, by conjugate gradients on its normal equations, which are never formed.

    They are preconditioned by the Kronecker product that they would be if the moment were one.
    """
    gram = factors[0] @ factors[0].T
    shape = problem.weight.shape[1:]
    one, two = (factors[other] for other in (1, 2, 3) if other != axis)
    rest = (one[:, :, None] * two[:, None, :]).reshape(len(one), -1)

    def expand(values: Array) -> Array:
        grid = (values[:, :, None] * rest[:, None, :]).reshape(len(rest), -1, one.shape[1], two.shape[1])
        return np.asarray(np.moveaxis(grid, 1, axis).reshape(len(rest), -1))

    def contract(values: Array) -> Array:
        grid = np.moveaxis(values.reshape(-1, *shape), axis, 1).reshape(len(rest), shape[axis - 1], -1)
        return np.asarray((grid @ rest[:, :, None])[:, :, 0])

    def apply(values: Array) -> Array:
        return contract(gram @ _weighed(problem, expand(values))) + problem.ridge * values

    along, across = problem.traces[axis - 1]
    mixing = np.linalg.inv(gram * (rest @ across @ rest.T) + problem.ridge * np.eye(len(rest)))
    space = np.linalg.inv(along)
    target = contract(factors[0] @ problem.product)
    return descend(
        apply, target, factors[axis], precondition=lambda values: mixing @ values @ space, steps=_GRADIENT_STEPS
    )


def _error(problem: _Problem, factors: _Factors) -> float:
    """Return the output error ``tr((W - V) C (W - V)^T)``."""
    wrong = problem.weight.reshape(len(problem.weight), -1) - factors[0].T @ _rows(factors)
    return max(0.0, float(np.sum(_weighed(problem, wrong) * wrong)))


def _energy(factors: _Factors) -> float:
    """Return the sum of squares of all components, each multiplied out."""
    return float(np.sum(np.prod([np.sum(factor**2, axis=1) for factor in factors], axis=0)))


def _objective(problem: _Problem, factors: _Factors) -> float:
    return _error(problem, factors) + problem.ridge * _energy(factors)


def _form(factors: _Factors, weight: Array) -> CP:
    """Balance the factors and give them the weight's type."""
    out, channels, vertical, horizontal = (part.astype(weight.dtype) for part in _balanced(factors))
    return CP(channels, vertical, horizontal, out.T)
