"""Tucker-2 (1 x 1, the kernel, 1 x 1) and the form that mixes channels first (1 x 1, the kernel)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.forms import InputLowRank, Tucker2
from edgecompress.factorize.separable import (
    MAX_ROUNDS,
    TOLERANCE,
    Problem,
    Steps,
    balanced,
    features,
    output_error,
    pose,
    ridged,
    solve_first,
    two_steps,
    whitened_start,
)

Array = NDArray[Any]


def input_low_rank(weight: Array, rank: int, moment: Array | None = None, *, rounds: int = MAX_ROUNDS) -> InputLowRank:
    """Return the form 1 x 1 then kernel of a canonical weight ``(O, I, *kernel)``.

    With the ``(d, d)`` second moment of the input the output error under ``regularised(moment)`` is minimised by
    alternation, without it the error of the weight by a truncated SVD. Raises ``ValueError`` for a weight without a
    kernel, a rank outside ``1 .. min(I, O prod(kernel))`` or a moment of the wrong size.
    """
    flat = _flat_kernel(weight)
    steps = two_steps(flat, rank, moment, rounds=rounds)
    left = steps.second.reshape(weight.shape[0], rank, *weight.shape[2:])
    return InputLowRank(left.astype(weight.dtype), steps.first.astype(weight.dtype))


def tucker2(weight: Array, ranks: tuple[int, int], moment: Array | None = None, *, rounds: int = MAX_ROUNDS) -> Tucker2:
    """Return the Tucker-2 form of a canonical weight ``(O, I, *kernel)`` with ``ranks = (out, in)``.

    Without a moment: higher-order orthogonal iteration (Kim et al. 2016). With the ``(d, d)`` second moment of the
    input: for a given ``in_factor`` the core and ``out_factor`` are a reduced-rank regression on the mixed channels,
    solved exactly by one eigenproblem; for given core and ``out_factor``, ``in_factor`` is the first of two linear
    steps. The two alternate, and the output error under ``regularised(moment)`` never rises. Raises ``ValueError`` for
    a weight without a kernel, ranks outside ``1 .. O`` and ``1 .. I`` or more than the other rank times the kernel
    supports, or a moment of the wrong size.
    """
    flat = _flat_kernel(weight).astype(np.float64)
    _check_ranks(flat.shape, ranks)
    core, out_factor, in_factor = _orthogonal_iteration(flat, ranks)
    if moment is not None and flat.any():
        problem = pose(flat, moment)
        start = Steps(in_factor, np.tensordot(out_factor, core, (1, 0)), 0.0)
        core, out_factor, in_factor = _alternate(problem, ranks, start, rounds)
    return _balanced_form(core, out_factor, in_factor, weight)


def _flat_kernel(weight: Array) -> Array:
    if weight.ndim < 3:
        raise ValueError(f"this form needs a weight with a kernel, not {weight.shape}")
    return weight.reshape(*weight.shape[:2], -1)


def _check_ranks(shape: tuple[int, ...], ranks: tuple[int, int]) -> None:
    outputs, channels, points = shape
    limits = min(outputs, ranks[1] * points), min(channels, ranks[0] * points)
    for rank, limit in zip(ranks, limits, strict=True):
        if not 1 <= rank <= limit:
            raise ValueError(f"rank {rank} of {ranks} is outside 1 .. {limit}")


def _orthogonal_iteration(flat: Array, ranks: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Return core, out_factor and in_factor by HOOI; the dense SVD makes it deterministic."""
    if not flat.any():
        return np.zeros((*ranks, flat.shape[2])), np.eye(flat.shape[0], ranks[0]), np.eye(ranks[1], flat.shape[1])
    from tensorly.decomposition import partial_tucker

    (core, (out_factor, channels)), _ = partial_tucker(
        flat, rank=list(ranks), modes=[0, 1], init="svd", svd="truncated_svd", random_state=0
    )
    return np.asarray(core), np.asarray(out_factor), np.asarray(channels).T


def _alternate(problem: Problem, ranks: tuple[int, int], start: Steps, rounds: int) -> tuple[Array, Array, Array]:
    """Return core, out_factor and in_factor after alternation from the better of two starts."""
    starts = (start.first, whitened_start(problem, ranks[1]))
    best, out_factor = min((_regressed(problem, first, ranks[0]) for first in starts), key=lambda pair: pair[0].error)
    for _ in range(rounds):
        steps, basis = _regressed(problem, solve_first(problem, best.first, best.second), ranks[0])
        if not steps.error < best.error:
            break
        gain, best, out_factor = best.error - steps.error, steps, basis
        if gain < TOLERANCE * best.error:
            break
    return np.tensordot(out_factor, best.second, (0, 0)), out_factor, best.first


def _regressed(problem: Problem, first: Array, rank: int) -> tuple[Steps, Array]:
    """Return the best second step of a rank over the outputs for a given ``first``, and the basis of its outputs.

    With ``A = R M^-1`` the unconstrained least squares, the best of rank ``rank`` is ``U U^T A``, where ``U`` holds
    the leading eigenvectors of ``A M A^T`` (the linear case of Zhang et al. 2016, in the space of the features).
    """
    moment, crossed = features(problem, first)
    regression = np.linalg.solve(ridged(moment), crossed.T).T
    _, vectors = np.linalg.eigh(regression @ crossed.T)
    basis = vectors[:, ::-1][:, :rank]
    second = (basis @ (basis.T @ regression)).reshape(problem.weight.shape[0], first.shape[0], -1)
    return Steps(first, second, output_error(problem, first, second)), basis


def _balanced_form(core: Array, out_factor: Array, in_factor: Array, weight: Array) -> Tucker2:
    """Give the factors fixed signs, rows and columns of similar norm, the weight's type and kernel."""
    inner = balanced(Steps(in_factor, core, 0.0))
    turned = balanced(Steps(out_factor.T, inner.second.transpose(2, 0, 1), 0.0))
    middle = turned.second.transpose(1, 2, 0).reshape(*core.shape[:2], *weight.shape[2:])
    kind = weight.dtype
    return Tucker2(middle.astype(kind), turned.first.T.astype(kind), inner.first.astype(kind))
