"""Separable kernels: the alternation never loses, reaches what is exact, and bears degenerate moments."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize import separable as module
from edgecompress.factorize.forms import Separable
from edgecompress.factorize.separable import (
    descend,
    output_error,
    pose,
    separable,
    solve_first,
    solve_second,
    two_steps,
)
from edgecompress.moments import regularised

Array = NDArray[Any]

SHAPES = st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(2, 3), st.integers(2, 4))


def random_moment(rng: np.random.Generator, size: int, rank: int | None = None) -> Array:
    """Return a second moment with a wide spectrum, of full or given rank."""
    mixing = rng.standard_normal((size, rank or size)) * np.logspace(0, -2, rank or size)
    return mixing @ mixing.T


def error_of(form: Any, weight: Array, moment: Array) -> float:
    wrong = (weight - form.to_dense()).reshape(len(weight), -1)
    return float(np.sum((wrong @ regularised(moment)) * wrong))


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**16), share=st.floats(0.1, 1.0))
def test_the_calibrated_form_is_never_worse_than_the_plain_one(
    shape: tuple[int, int, int, int], seed: int, share: float
) -> None:
    rng = np.random.default_rng(seed)
    weight, size = rng.standard_normal(shape), int(np.prod(shape[1:]))
    rank = max(1, int(share * min(shape[1] * shape[2], shape[0] * shape[3])))
    moment = random_moment(rng, size)
    calibrated, plain = (error_of(separable(weight, rank, known), weight, moment) for known in (moment, None))
    assert calibrated <= plain * (1 + 1e-9) + 1e-9 * error_of(_zero(shape), weight, moment)


@pytest.mark.parametrize("seed", range(4))
def test_a_moment_far_from_any_product_does_not_lead_the_start_astray(seed: int) -> None:
    # Nearly all energy along one direction that mixes channels and columns: whitening by a product doubles the error.
    rng = np.random.default_rng(seed)
    weight, along = rng.standard_normal((4, 6, 3)), rng.standard_normal((18, 1))
    moment = along @ along.T * 10 + np.diag(rng.random(18) ** 6)
    problem = pose(weight, moment)
    for rank in (1, 2, 3, 4):
        first = module.plain_start(weight, rank).first
        other = output_error(problem, first, solve_second(problem, first))
        assert two_steps(weight, rank, moment, rounds=0).error <= other * (1 + 1e-9)


def test_a_round_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(14)
    weight, moment = rng.standard_normal((6, 4, 3, 3)), random_moment(rng, 36)
    start = separable(weight, 5, moment, rounds=0)
    monkeypatch.setattr(module, "solve_first", lambda _, first, __: rng.standard_normal(first.shape))
    assert separable(weight, 5, moment).vertical.tobytes() == start.vertical.tobytes()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), rank=st.integers(1, 7))
def test_every_round_lowers_the_error(seed: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 4, 3, 3))
    moment = random_moment(rng, 36)
    errors = [error_of(separable(weight, rank, moment, rounds=rounds), weight, moment) for rounds in range(6)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_calibration_gains_where_the_inputs_are_correlated() -> None:
    rng = np.random.default_rng(0)
    weight, moment = rng.standard_normal((8, 4, 3, 3)), random_moment(rng, 36, rank=8)
    calibrated, plain = (error_of(separable(weight, 6, known), weight, moment) for known in (moment, None))
    assert calibrated < 0.5 * plain


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 3, 2), (2, 4, 3, 3), (1, 1, 2, 2)])
def test_full_rank_is_exact(shape: tuple[int, int, int, int], calibrated: bool) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal(shape)
    moment = random_moment(rng, int(np.prod(shape[1:]))) if calibrated else None
    form = separable(weight, min(shape[1] * shape[2], shape[0] * shape[3]), moment)
    np.testing.assert_allclose(form.to_dense(), weight, atol=1e-6)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_separable_weight_is_found_at_its_own_rank(calibrated: bool) -> None:
    rng = np.random.default_rng(2)
    weight = Separable(rng.standard_normal((3, 5, 3, 1)), rng.standard_normal((7, 3, 1, 3))).to_dense()
    form = separable(weight, 3, random_moment(rng, 45) if calibrated else None)
    np.testing.assert_allclose(form.to_dense(), weight, atol=1e-6)


def test_without_a_moment_the_error_is_that_of_the_truncated_svd() -> None:
    weight = np.random.default_rng(3).standard_normal((6, 4, 3, 5))
    values = np.linalg.svd(weight.transpose(1, 2, 0, 3).reshape(12, 30), compute_uv=False)
    wrong = weight - separable(weight, 5).to_dense()
    assert np.sum(wrong**2) == pytest.approx(np.sum(values[5:] ** 2), rel=1e-10)


def test_a_moment_that_is_a_kronecker_product_is_solved_exactly_at_once() -> None:
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((5, 3, 2, 3))
    rows, columns = regularised(random_moment(rng, 6)), regularised(random_moment(rng, 3))
    problem = pose(weight.reshape(5, 6, 3), np.kron(rows, columns))
    left, right = np.linalg.cholesky(rows), np.linalg.cholesky(columns)
    white = np.einsum("opb,pq,bc->qoc", problem.weight, left, right).reshape(6, 15)
    best = np.sum(np.linalg.svd(white, compute_uv=False)[4:] ** 2)
    found = two_steps(problem.weight, 4, np.kron(rows, columns), rounds=0).error
    # The damping adds 1 % of the mean to the diagonal, which is a product only nearly.
    assert best <= found <= best + 1.1 * 0.01 * np.mean(np.diagonal(np.kron(rows, columns))) * np.sum(weight**2)


def test_both_steps_solve_their_dense_normal_equations() -> None:
    rng = np.random.default_rng(5)
    outputs, inner, points, rank = 4, 6, 3, 3
    problem = pose(rng.standard_normal((outputs, inner, points)), random_moment(rng, inner * points))
    first = rng.standard_normal((rank, inner))
    root = np.linalg.cholesky(problem.moment)
    target = (problem.weight.reshape(outputs, -1) @ root).ravel()

    def dense_solution(build: Any, size: int) -> Array:
        columns = [(build(unit).reshape(outputs, -1) @ root).ravel() for unit in np.eye(size)]
        return np.linalg.lstsq(np.array(columns).T, target, rcond=None)[0]

    def from_second(values: Array) -> Array:
        return np.einsum("orb,rp->opb", values.reshape(outputs, rank, points), first)

    second = solve_second(problem, first)
    np.testing.assert_allclose(
        second.ravel(), dense_solution(from_second, outputs * rank * points), rtol=1e-6, atol=1e-8
    )

    def from_first(values: Array) -> Array:
        return np.einsum("orb,rp->opb", second, values.reshape(rank, inner))

    better = solve_first(problem, np.zeros_like(first), second, steps=200)
    np.testing.assert_allclose(better.ravel(), dense_solution(from_first, rank * inner), rtol=1e-5, atol=1e-7)
    few = solve_first(problem, first, second)
    assert output_error(problem, better, second) <= output_error(problem, few, second) * (1 + 1e-9)
    assert output_error(problem, few, second) < output_error(problem, first, second)


def test_uncorrelated_kernel_points_need_one_gradient_step() -> None:
    # There the preconditioner is the normal matrix itself.
    rng = np.random.default_rng(12)
    problem = pose(rng.standard_normal((5, 6, 3)), np.kron(random_moment(rng, 6), np.eye(3)))
    second = rng.standard_normal((5, 4, 3))
    once, often = (solve_first(problem, rng.standard_normal((4, 6)), second, steps=steps) for steps in (1, 50))
    np.testing.assert_allclose(once, often, rtol=1e-6, atol=1e-8)


def test_conjugate_gradients_stop_at_the_solution() -> None:
    matrix = np.diag([1.0, 2.0, 5.0])
    exact = np.array([[1.0, -2.0, 3.0]])
    target = exact @ matrix
    found = descend(lambda x: x @ matrix, target, exact, precondition=lambda x: x, steps=50)
    np.testing.assert_array_equal(found, exact)
    found = descend(lambda x: x @ matrix, target, 0 * exact, precondition=lambda x: x, steps=50)
    np.testing.assert_allclose(found, exact, rtol=1e-12)


def test_a_moment_of_zeros_is_the_plain_problem() -> None:
    weight = np.random.default_rng(6).standard_normal((5, 3, 3, 3))
    known, plain = separable(weight, 4, np.zeros((27, 27))), separable(weight, 4)
    np.testing.assert_allclose(known.to_dense(), plain.to_dense(), atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_moment_of_low_rank_is_no_trouble(rank: int) -> None:
    rng = np.random.default_rng(7)
    weight, moment = rng.standard_normal((5, 3, 3, 3)), random_moment(rng, 27, rank=rank)
    form = separable(weight, 4, moment)
    assert np.isfinite(form.to_dense()).all()
    assert error_of(form, weight, moment) <= error_of(separable(weight, 4), weight, moment)


def test_a_weight_of_zeros_and_one_with_dead_channels_stay_finite() -> None:
    moment = random_moment(np.random.default_rng(8), 27)
    assert not separable(np.zeros((5, 3, 3, 3)), 4, moment).to_dense().any()
    weight = np.zeros((5, 3, 3, 3))
    weight[2, 1] = 1.0
    np.testing.assert_allclose(separable(weight, 4, moment).to_dense(), weight, atol=1e-6)


def test_the_same_input_gives_the_same_bytes_in_the_type_of_the_weight() -> None:
    rng = np.random.default_rng(9)
    weight, moment = rng.standard_normal((6, 4, 3, 3)).astype(np.float32), random_moment(rng, 36)
    one, two = separable(weight, 5, moment), separable(weight.copy(), 5, moment.copy())
    assert one.vertical.dtype == one.horizontal.dtype == np.float32
    assert one.vertical.shape == (5, 4, 3, 1)
    assert one.horizontal.shape == (6, 5, 1, 3)
    assert one.vertical.tobytes() == two.vertical.tobytes()
    assert one.horizontal.tobytes() == two.horizontal.tobytes()


def test_both_steps_carry_the_same_norm_and_the_sign_is_fixed() -> None:
    rng = np.random.default_rng(10)
    form = separable(rng.standard_normal((6, 4, 3, 3)), 5, random_moment(rng, 36))
    first = form.vertical.reshape(5, -1)
    np.testing.assert_allclose(
        np.linalg.norm(first, axis=1), np.sqrt(np.sum(form.horizontal**2, axis=(0, 2, 3))), rtol=1e-9
    )
    assert (first[np.arange(5), np.argmax(np.abs(first), axis=1)] > 0).all()


def test_single_precision_gradients_lose_nothing_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    weight, moment = rng.standard_normal((8, 6, 3, 3)), random_moment(rng, 54)
    double = error_of(separable(weight, 6, moment), weight, moment)
    monkeypatch.setattr(module, "_SINGLE_PRECISION_ABOVE", 1)
    assert pose(weight.reshape(8, 18, 3), moment).blocks.dtype == np.float32
    assert error_of(separable(weight, 6, moment), weight, moment) == pytest.approx(double, rel=5e-3)


def test_ranks_and_shapes_that_do_not_fit_are_refused() -> None:
    weight = np.ones((5, 3, 3, 2))
    for rank in (0, 10):
        with pytest.raises(ValueError, match=r"outside 1 \.\. 9"):
            separable(weight, rank)
    with pytest.raises(ValueError, match=r"the weight needs \(18, 18\)"):
        separable(weight, 2, np.eye(17))
    with pytest.raises(ValueError, match="needs a weight"):
        separable(np.ones((5, 3, 3)), 2)


def _zero(shape: tuple[int, int, int, int]) -> Separable:
    outputs, channels, height, width = shape
    return Separable(np.zeros((1, channels, height, 1)), np.zeros((outputs, 1, 1, width)))
