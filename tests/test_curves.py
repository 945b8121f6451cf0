"""Curves of the error over the rank: exact where that is cheap, near the solved errors elsewhere."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from edgecompress.factorize import curves as module
from edgecompress.factorize.curves import error_curve
from edgecompress.factorize.rank import max_ranks, ranks_for_share, solve
from edgecompress.factorize.sizes import FormName
from edgecompress.factorize.solve import solve_layer
from edgecompress.moments import Moments, regularised, regularised_diagonal

Array = NDArray[Any]
FORMS: tuple[FormName, ...] = get_args(FormName)
KERNEL_FORMS = tuple(form for form in FORMS if form not in ("svd", "svd_bias", "spectral"))


def random_moments(rng: np.random.Generator, size: int, groups: int = 1) -> Moments:
    mixing = rng.standard_normal((groups, size, size)) * np.logspace(0, -2, size)
    return Moments("w", mixing @ mixing.transpose(0, 2, 1), 100)


def error(approximation: Array, weight: Array, moments: Moments | None) -> float:
    groups = 1 if moments is None else len(moments.second_moment)
    wrong = (weight - approximation).reshape(groups, len(weight) // groups, -1).astype(np.float64)
    if moments is None:
        return float(np.sum(wrong**2))
    damped = [
        regularised(own) if own.ndim == 2 else np.diag(regularised_diagonal(own)) for own in moments.second_moment
    ]
    return float(sum(np.sum((rows @ each) * rows) for rows, each in zip(wrong, damped, strict=True)))


@pytest.mark.parametrize(
    ("form", "known"),
    [("svd", "nothing"), ("svd", "diagonal"), ("svd", "all"), ("spectral", "nothing"), ("spectral", "all")],
)
def test_exact_curves_are_the_errors_of_the_solved_forms(form: FormName, known: str) -> None:
    rng = np.random.default_rng(4)
    weight, full = rng.standard_normal((5, 3, 2, 2)), random_moments(rng, 12)
    diagonal = Moments("w", full.diagonal, 100)
    moments = {"nothing": None, "diagonal": diagonal, "all": full}[known]
    ranks = [(rank,) for rank in range(1, 6)] if form == "svd" else [(rank, 2 * rank) for rank in range(1, 6)]
    curve = error_curve(form, weight, ranks, moments, anchors=[1])
    solved = [error(solve_layer(form, weight, entry, moments).to_dense(), weight, moments) for entry in ranks]
    # 1e-7: the curve sums eigenvalues of a product, the oracle multiplies out; 1e-8 at the end, where all is kept
    np.testing.assert_allclose(curve.errors, solved, rtol=1e-7, atol=1e-8)
    assert curve.energy == pytest.approx(error(0 * weight, weight, moments))
    assert sorted(curve.solved) == [0, 1, 4]
    for place, dense in curve.solved.items():
        assert error(dense, weight, moments) == pytest.approx(solved[place], rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_other_curves_fall_and_stay_near_the_solved_errors(form: FormName) -> None:
    rng = np.random.default_rng(5)
    weight, moments = rng.standard_normal((8, 6, 3, 3)), random_moments(rng, 54)
    ranks = sorted({ranks_for_share(form, weight.shape, share) for share in np.linspace(0.2, 0.9, 12)})
    curve = error_curve(form, weight, ranks, moments, anchors=[len(ranks) // 3, 2 * len(ranks) // 3])
    assert curve.errors.shape == (len(ranks),)
    assert (np.diff(curve.errors) <= 0).all()
    for index in (0, len(ranks) // 2, len(ranks) - 1):
        solved = error(solve(form, weight, ranks[index], moments.second_moment[0]).to_dense(), weight, moments)
        # A random weight is the worst case for two rounds; cp alternates slowest. Trained ones are within a few %.
        assert 0.9 * solved <= curve.errors[index] <= (3.0 if form == "cp" else 2.0) * solved


@pytest.mark.parametrize("form", ["svd", "separable"])
def test_groups_add_up_under_their_own_moments(form: FormName) -> None:
    rng = np.random.default_rng(6)
    weight, moments = rng.standard_normal((8, 3, 3, 3)), random_moments(rng, 27, groups=2)
    ranks = [(1,), (2,), (3,)]
    curve = error_curve(form, weight, ranks, moments, anchors=[1], groups=2)
    for place, dense in curve.solved.items():
        assert dense.shape == weight.shape
        assert curve.errors[place] == pytest.approx(error(dense, weight, moments), rel=1e-7)


def test_the_weights_keep_their_type_where_they_are_put_into_a_model() -> None:
    weight = np.random.default_rng(7).standard_normal((4, 3, 3, 3)).astype(np.float32)
    for form in ("svd", "separable"):
        curve = error_curve(form, weight, [(1,), (2,)], None, anchors=[])
        assert {dense.dtype for dense in curve.solved.values()} == {np.dtype(np.float32)}


def test_an_affine_form_counts_as_the_linear_one() -> None:
    weight = np.random.default_rng(8).standard_normal((6, 4))
    ranks = [(rank,) for rank in (1, 2, 3)]
    linear, affine = (error_curve(form, weight, ranks, None, anchors=[]) for form in ("svd", "svd_bias"))
    np.testing.assert_array_equal(affine.errors, linear.errors)
    assert affine.form == "svd_bias"


def test_a_solver_that_does_worse_with_more_does_not_bend_the_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.ones((4, 4, 3, 3))
    best = solve("separable", weight, (1,))

    class Worse:
        def to_dense(self) -> Array:
            return weight + 1.0

    monkeypatch.setattr(module, "solve", lambda _form, _weight, ranks, _moment, **_: best if ranks == (1,) else Worse())
    curve = error_curve("separable", weight, [(1,), (2,), (3,)], None, anchors=[1])
    assert (np.diff(curve.errors) <= 0).all()


def test_a_curve_of_zeros_stays_finite() -> None:
    for form in FORMS:
        ranks = [(1,), (2,)] if len(max_ranks(form, (4, 4, 3, 3))) == 1 else [(1, 1), (2, 2)]
        errors = error_curve(form, np.zeros((4, 4, 3, 3)), ranks, None, anchors=[]).errors
        assert (errors > 0).all()
        assert (errors < 1e-300).all()
