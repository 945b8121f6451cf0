"""The CP form: it never loses against its start, and its components do not run away."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize import cp as module
from edgecompress.factorize.cp import cp
from edgecompress.factorize.forms import CP
from edgecompress.moments import regularised

Array = NDArray[Any]


def random_moment(rng: np.random.Generator, size: int, rank: int | None = None) -> Array:
    mixing = rng.standard_normal((size, rank or size)) * np.logspace(0, -2, rank or size)
    return mixing @ mixing.T


def error_of(form: CP, weight: Array, moment: Array | None) -> float:
    wrong = (weight - form.to_dense()).reshape(len(weight), -1)
    return float(np.sum((wrong if moment is None else wrong @ regularised(moment)) * wrong))


def component_energy(form: CP) -> float:
    parts = (form.in_factor, form.vertical, form.horizontal, form.out_factor.T)
    return float(np.sum(np.prod([np.sum(part.astype(np.float64) ** 2, axis=1) for part in parts], axis=0)))


def started(weight: Array, rank: int) -> CP:
    """Return tensorly's own result: where the solver starts."""
    return cp(weight, rank, rounds=0)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 6), st.integers(2, 5), st.integers(1, 3), st.integers(2, 3)),
    seed=st.integers(0, 2**16),
    share=st.floats(0.1, 1.0),
    calibrated=st.booleans(),
)
def test_the_result_is_finite_and_never_worse_than_its_start(
    shape: tuple[int, int, int, int], seed: int, share: float, calibrated: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    rank = max(1, int(share * weight.size / max(shape)))
    moment = random_moment(rng, weight[0].size) if calibrated else None
    form, start = cp(weight, rank, moment), started(weight, rank)
    assert np.isfinite(form.to_dense()).all()
    energy = error_of(_zero(shape), weight, moment)
    if component_energy(start) <= module.DEGENERATE * np.sum(weight**2):
        assert error_of(form, weight, moment) <= error_of(start, weight, moment) * (1 + 1e-9) + 1e-9 * energy
    assert error_of(form, weight, moment) <= energy * (1 + 1e-9)


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_penalised_error_falls_from_round_to_round(calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", 0.0)
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 5, 3, 3))
    moment = random_moment(rng, 45) if calibrated else None
    ridge = module.PENALTY * (1.0 if moment is None else np.mean(np.diagonal(regularised(moment))))
    costs = []
    for rounds in range(1, 8):
        form = cp(weight, 9, moment, rounds=rounds)
        costs.append(error_of(form, weight, moment) + ridge * component_energy(form))
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(costs))
    assert costs[-1] < 0.99 * costs[0]


def test_a_round_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    weight, moment = rng.standard_normal((6, 5, 3, 3)), random_moment(rng, 45)
    monkeypatch.setattr(module, "_round", lambda _, factors: [2.0 * factor for factor in factors])
    assert cp(weight, 9, moment).in_factor.tobytes() == started(weight, 9).in_factor.tobytes()


def test_calibration_gains_where_the_inputs_are_correlated() -> None:
    rng = np.random.default_rng(1)
    weight, moment = rng.standard_normal((8, 6, 3, 3)), random_moment(rng, 54, rank=8)
    assert error_of(cp(weight, 8, moment), weight, moment) < 0.5 * error_of(cp(weight, 8), weight, moment)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_weight_of_few_components_is_found(calibrated: bool) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.standard_normal((2, size)) for size in (6, 3, 3)]
    weight = CP(*parts, rng.standard_normal((7, 2))).to_dense()
    moment = random_moment(rng, 54) if calibrated else None
    form = cp(weight, 2, moment)
    # The penalty costs about PENALTY of the energy, squared: far below this.
    assert error_of(form, weight, None) <= 1e-5 * np.sum(weight**2)


def test_one_component_of_a_matrix_is_its_leading_singular_triple() -> None:
    weight = np.random.default_rng(3).standard_normal((6, 5, 1, 1))
    values = np.linalg.svd(weight[:, :, 0, 0], compute_uv=False)
    assert error_of(cp(weight, 1), weight, None) == pytest.approx(np.sum(values[1:] ** 2), rel=1e-3)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_tensor_without_a_best_approximation_keeps_bounded_components(calibrated: bool) -> None:
    # aab + aba + baa has rank 3; rank 2 comes as close as one likes, with components that grow without bound.
    rng = np.random.default_rng(4)
    a, b = np.eye(3)[0], np.eye(3)[1]
    core = np.einsum("i,j,k->ijk", a, a, b) + np.einsum("i,j,k->ijk", a, b, a) + np.einsum("i,j,k->ijk", b, a, a)
    weight = core[:, :, :, None] * np.array([1.0, 0.5])
    moment = random_moment(rng, 18) if calibrated else None
    form = cp(weight, 2, moment)
    assert np.isfinite(form.to_dense()).all()
    assert component_energy(form) <= module.DEGENERATE * np.sum(weight**2)
    assert error_of(form, weight, moment) < 0.2 * error_of(_zero(weight.shape), weight, moment)


def test_a_degenerate_start_is_left_behind_even_if_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal((1, size)) for size in (4, 3, 2, 2)]
    weight = np.einsum("ro,ri,ra,rb->oiab", *parts)
    cancelling = [1e2 * rng.standard_normal((1, size)) for size in (4, 3, 2, 2)]
    start = [np.concatenate([part, huge, huge]) for part, huge in zip(parts, cancelling, strict=True)]
    start[0][2] *= -1.0
    monkeypatch.setattr(module, "_parafac", lambda *_: tuple(start))
    form = cp(weight, 3)
    assert component_energy(form) <= module.DEGENERATE * np.sum(weight**2)
    assert error_of(form, weight, None) <= 1e-3 * np.sum(weight**2)


def test_without_a_moment_one_gradient_step_solves_an_inner_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    # There the preconditioner is the normal matrix itself, for all three axes.
    rng = np.random.default_rng(10)
    weight = rng.standard_normal((5, 4, 3, 2))
    problem = module._pose(weight, None)
    for axis in (1, 2, 3):
        factors = module._scale_in([rng.standard_normal((3, size)) for size in weight.shape], axis)
        monkeypatch.setattr(module, "_GRADIENT_STEPS", 1)
        solved = module._solve_inner(problem, factors, axis)

        def residual(values: Array, factors: Any = factors, axis: int = axis) -> Array:
            trial = [values if at == axis else factor for at, factor in enumerate(factors)]
            wrong = np.einsum("ro,ri,ra,rb->oiab", *trial) - weight
            return np.concatenate([wrong.ravel(), np.sqrt(problem.ridge) * np.ravel(values)])

        offset = residual(np.zeros_like(solved))
        units = np.eye(solved.size).reshape(-1, *solved.shape)
        design = np.array([residual(unit) - offset for unit in units]).T
        best = np.linalg.lstsq(design, -offset, rcond=None)[0]
        np.testing.assert_allclose(solved.ravel(), best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_moments_and_weights_stay_finite(rank: int) -> None:
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((5, 4, 3, 3))
    moment = random_moment(rng, 36, rank=rank) if rank else np.zeros((36, 36))
    form = cp(weight, 6, moment)
    assert np.isfinite(form.to_dense()).all()
    assert error_of(form, weight, moment) <= error_of(started(weight, 6), weight, moment) * (1 + 1e-9)
    assert not cp(np.zeros_like(weight), 6, moment).to_dense().any()


def test_a_moment_of_zeros_is_the_plain_problem() -> None:
    weight = np.random.default_rng(7).standard_normal((5, 4, 3, 3))
    known, plain = cp(weight, 6, np.zeros((36, 36))), cp(weight, 6)
    np.testing.assert_allclose(known.to_dense(), plain.to_dense(), atol=1e-8)


def test_the_same_input_gives_the_same_bytes_and_no_warning() -> None:
    rng = np.random.default_rng(8)
    weight, moment = rng.standard_normal((6, 5, 3, 3)).astype(np.float32), random_moment(rng, 45)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = cp(weight, 9, moment), cp(weight.copy(), 9, moment)
    assert [part.shape for part in vars(one).values()] == [(9, 5), (9, 3), (9, 3), (6, 9)]
    for part, again in zip(vars(one).values(), vars(two).values(), strict=True):
        assert part.dtype == np.float32
        assert part.tobytes() == again.tobytes()


def test_all_four_factors_carry_the_same_norm() -> None:
    form = cp(np.random.default_rng(9).standard_normal((6, 5, 3, 3)), 4)
    norms = [
        np.linalg.norm(part, axis=1) for part in (form.in_factor, form.vertical, form.horizontal, form.out_factor.T)
    ]
    np.testing.assert_allclose(norms, np.broadcast_to(norms[0], (4, 4)), rtol=1e-9)


def test_ranks_and_shapes_that_do_not_fit_are_refused() -> None:
    weight = np.ones((5, 4, 3, 2))
    for rank in (0, 25):
        with pytest.raises(ValueError, match=r"outside 1 \.\. 24"):
            cp(weight, rank)
    with pytest.raises(ValueError, match="needs a weight"):
        cp(np.ones((5, 4, 3)), 2)
    with pytest.raises(ValueError, match="the weight needs"):
        cp(weight, 2, np.eye(23))


def _zero(shape: tuple[int, ...]) -> CP:
    outputs, channels, height, width = shape
    return CP(np.zeros((1, channels)), np.zeros((1, height)), np.zeros((1, width)), np.zeros((outputs, 1)))
