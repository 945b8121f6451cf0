"""Separable kernels (``kh x 1``, then ``1 x kw``), and the solver behind every form that is two linear steps in a row.

Such a form is ``V[o, p, b] = sum_r second[o, r, b] first[r, p]``, where the flattened patch is split into ``(p, b)``:
for a separable kernel ``p = (i, a)`` and ``b`` is the column of the kernel; for a 1 x 1 convolution before the kernel
``p = i`` and ``b`` is the whole kernel. The output error ``tr((W - V) C (W - V)^T)`` is quadratic in either step, so
the two are solved in turn:

- ``second``: least squares on the features ``first @ x``, a system of ``rank * B`` unknowns, exact.
- ``first``: ``rank * P`` unknowns whose normal matrix is the sum of Kronecker products ``sum_bc G_bc (x) C_bc``. It is
  never formed: a few steps of conjugate gradients, preconditioned by ``(sum_b G_bb) (x) (mean_b C_bb)``, cost two
  matrix products each.

The error never rises. The start is the truncated SVD of the kernel rearranged to ``P x (O B)``, whitened by the nearest
Kronecker product of ``C`` (its exact solution, were the moment such a product) or not at all, whichever is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import Separable
from edgecompress.factorize.truncated import truncated_svd
from edgecompress.moments import regularised

Array = NDArray[Any]

MAX_ROUNDS = 40
"""Rounds of alternation at most; about ten are usual."""

TOLERANCE = 5e-4
"""A round that lowers the error by less than this part of it is the last one."""

_GRADIENT_STEPS = 5
_SINGLE_PRECISION_ABOVE = 1024
_CONVERGED = 1e-16
_RIDGE = 1e-12


@dataclass(frozen=True)
class Problem:
    """A weight to approximate and the moment that weighs the error, arranged for the two steps.

    Shapes:
        weight: ``(O, P, B)``
        moment: ``(P * B, P * B)``, positive definite
        product: ``(O, P, B)``: ``weight @ moment``
        blocks: ``(P, B * B * P)``: ``C[q c, p b]`` at row ``q`` and column ``(c, b, p)``; float32 for wide layers
        mean_block: ``(P, P)``: the mean of the blocks with ``c = b``
    """

    weight: Array
    moment: Array
    product: Array
    blocks: Array
    mean_block: Array


@dataclass(frozen=True)
class Steps:
    """The two steps of a form and the output error that they leave.

    Shapes:
        first: ``(rank, P)``
        second: ``(O, rank, B)``
    """

    first: Array
    second: Array
    error: float


def separable(weight: Array, rank: int, moment: Array | None = None, *, rounds: int = MAX_ROUNDS) -> Separable:
    """Return a separable form of a canonical weight ``(O, I, kh, kw)``.

    With the ``(d, d)`` second moment of the layer's input, ``d = I kh kw``, the output error under
    ``regularised(moment)`` is minimised; without it the error of the weight, which a truncated SVD solves (Jaderberg
    et al. 2014, scheme 2). Raises ``ValueError`` for a rank outside ``1 .. min(I kh, O kw)`` and for shapes that do
    not match.
    """
    if weight.ndim != 4:
        raise ValueError(f"a separable form needs a weight (O, I, kh, kw), not {weight.shape}")
    outputs, channels, height, width = weight.shape
    steps = two_steps(weight.reshape(outputs, channels * height, width), rank, moment, rounds=rounds)
    vertical = steps.first.reshape(rank, channels, height, 1).astype(weight.dtype)
    return Separable(vertical, steps.second[:, :, None, :].astype(weight.dtype))


def two_steps(weight: Array, rank: int, moment: Array | None, *, rounds: int = MAX_ROUNDS) -> Steps:
    """Solve ``V[o, p, b] = sum_r second[o, r, b] first[r, p]`` for a weight ``(O, P, B)``.

    Both steps get the same norm per component and signs that do not depend on the LAPACK build. Raises ``ValueError``
    for a rank outside ``1 .. min(P, O B)`` or a moment of the wrong size.
    """
    outputs, inner, points = weight.shape
    limit = min(inner, outputs * points)
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is outside 1 .. {limit}")
    wide = weight.astype(np.float64)
    if moment is None:
        return balanced(plain_start(wide, rank))
    problem = pose(wide, moment)
    starts = (plain_start(wide, rank).first, whitened_start(problem, rank))
    best = min((_completed(problem, start) for start in starts), key=lambda steps: steps.error)
    for _ in range(rounds):
        steps = _completed(problem, solve_first(problem, best.first, best.second))
        if not steps.error < best.error:
            break
        gain, best = best.error - steps.error, steps
        if gain < TOLERANCE * best.error:
            break
    return balanced(best)


def pose(weight: Array, moment: Array) -> Problem:
    """Arrange a float64 weight ``(O, P, B)`` and its ``(P B, P B)`` moment; ``ValueError`` where they do not match."""
    outputs, inner, points = weight.shape
    if moment.shape != (inner * points, inner * points):
        raise ValueError(f"the moment has shape {moment.shape}; the weight needs {(inner * points,) * 2}")
    damped = regularised(moment.astype(np.float64))
    by_point = damped.reshape(inner, points, inner, points)
    return Problem(
        weight=weight,
        moment=damped,
        product=(weight.reshape(outputs, -1) @ damped).reshape(weight.shape),
        blocks=np.ascontiguousarray(by_point.transpose(0, 1, 3, 2), _gradient_type(damped)).reshape(inner, -1),
        mean_block=np.einsum("pbqb->pq", by_point) / points,
    )


def _gradient_type(moment: Array) -> type[np.floating[Any]]:
    """Gradients of wide layers are formed in single precision: they only point downhill; errors are in double."""
    return np.float32 if len(moment) > _SINGLE_PRECISION_ABOVE else np.float64


def output_error(problem: Problem, first: Array, second: Array) -> float:
    """Return ``tr((W - V) C (W - V)^T)``, at least 0."""
    wrong = (problem.weight - multiplied(first, second)).reshape(problem.weight.shape[0], -1)
    return max(0.0, float(np.sum((wrong @ problem.moment) * wrong)))


def multiplied(first: Array, second: Array) -> Array:
    """Return ``V (O, P, B)``."""
    return np.asarray(np.tensordot(second, first, (1, 0)).transpose(0, 2, 1))


def features(problem: Problem, first: Array) -> tuple[Array, Array]:
    """Return the moment ``(r B, r B)`` of the features ``first @ x``, and ``W C`` in these features ``(O, r B)``."""
    outputs, inner, points = problem.weight.shape
    size = first.shape[0] * points
    half = np.tensordot(first, problem.moment.reshape(inner, points, inner, points), (1, 0))
    moment = np.tensordot(half, first, (2, 1)).transpose(0, 1, 3, 2).reshape(size, size)
    crossed = np.tensordot(problem.product, first, (1, 1)).transpose(0, 2, 1).reshape(outputs, size)
    return moment, crossed


def ridged(matrix: Array) -> Array:
    """Return a positive semi-definite matrix made safe to invert, by no more than rounding errors on its diagonal.

    A component that is zero stays zero; even a matrix of zeros can be inverted.
    """
    size = len(matrix)
    return matrix + (_RIDGE * float(np.trace(matrix)) / size + np.finfo(np.float64).tiny) * np.eye(size)


def solve_second(problem: Problem, first: Array) -> Array:
    """Return the best ``second`` for a given ``first``."""
    moment, crossed = features(problem, first)
    second = np.linalg.solve(ridged(moment), crossed.T).T
    return np.asarray(second.reshape(problem.weight.shape[0], first.shape[0], -1))


def solve_first(problem: Problem, first: Array, second: Array, steps: int = _GRADIENT_STEPS) -> Array:
    """Return a better ``first`` for the given ``second``, by preconditioned conjugate gradients from ``first``."""
    outputs, rank, points = second.shape
    flat = second.reshape(outputs, rank * points)
    gram = (flat.T @ flat).reshape(rank, points, rank, points)
    mixing = gram.transpose(0, 2, 3, 1).reshape(rank, -1)
    channel = np.linalg.inv(ridged(np.einsum("rbsb->rs", gram)))
    space = np.linalg.inv(problem.mean_block)
    target = np.tensordot(second, problem.product, ((0, 2), (0, 2)))

    def apply(values: Array) -> Array:
        kind = problem.blocks.dtype
        image = mixing.astype(kind, copy=False) @ (values.astype(kind) @ problem.blocks).reshape(-1, values.shape[1])
        return np.asarray(image, np.float64)

    return descend(apply, target, first, precondition=lambda values: channel @ values @ space, steps=steps)


def descend(
    apply: Callable[[Array], Array], target: Array, start: Array, *, precondition: Callable[[Array], Array], steps: int
) -> Array:
    """Return a better solution of ``apply(x) = target`` by preconditioned conjugate gradients from ``start``.

    ``apply`` and ``precondition`` are symmetric positive definite; the quadratic that the equation minimises never
    rises.
    """
    solution, residual = start, target - apply(start)
    direction = towards = precondition(residual)
    size = first = float(np.sum(residual * towards))
    for _ in range(steps):
        if not size > _CONVERGED * first:
            break
        image = apply(direction)
        length = size / float(np.sum(direction * image))
        solution, residual = solution + length * direction, residual - length * image
        towards = precondition(residual)
        size, before = float(np.sum(residual * towards)), size
        direction = towards + (size / before) * direction
    return solution


def plain_start(weight: Array, rank: int) -> Steps:
    """Return the best steps in the Frobenius norm: a truncated SVD of the weight rearranged to ``P x (O B)``."""
    outputs, inner, points = weight.shape
    left, values, right = truncated_svd(weight.transpose(1, 0, 2).reshape(inner, -1), rank)
    second = (values[:, None] * right).reshape(rank, outputs, points).transpose(1, 0, 2)
    return Steps(left.T, second, max(0.0, float(np.sum(weight**2) - np.sum(values**2))))


def whitened_start(problem: Problem, rank: int) -> Array:
    """Return the ``first`` that would be best if the moment were the Kronecker product of its two partial traces."""
    outputs, inner, points = problem.weight.shape
    by_point = problem.moment.reshape(inner, points, inner, points)
    left, inverse = square_roots(problem.mean_block)
    right, _ = square_roots(np.einsum("pbpc->bc", by_point))
    white = np.tensordot(left, problem.weight @ right, (1, 1)).reshape(inner, outputs * points)
    return np.asarray((inverse @ truncated_svd(white, rank)[0]).T)


def square_roots(matrix: Array) -> tuple[Array, Array]:
    """Return the symmetric square root of a positive definite matrix and its inverse."""
    values, vectors = np.linalg.eigh(matrix)
    roots = np.sqrt(np.maximum(values, values[-1] * _RIDGE))
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


def balanced(steps: Steps) -> Steps:
    """Give both steps the same norm per component, and the largest entry of every row of ``first`` a positive sign."""
    first, second = steps.first, steps.second
    norms = np.linalg.norm(first, axis=1), np.sqrt(np.sum(second**2, axis=(0, 2)))
    alive = (norms[0] > 0) & (norms[1] > 0)
    scale = np.where(alive, np.sqrt(norms[1] / np.where(alive, norms[0], 1.0)), 0.0)
    strongest = np.take_along_axis(first, np.argmax(np.abs(first), axis=1)[:, None], axis=1)[:, 0]
    scale = np.where(strongest < 0, -scale, scale)
    second = second * np.where(alive, 1.0 / np.where(alive, scale, 1.0), 0.0)[:, None]
    return Steps(first * scale[:, None], second, steps.error)


def _completed(problem: Problem, first: Array) -> Steps:
    second = solve_second(problem, first)
    return Steps(first, second, output_error(problem, first, second))
