from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.factorize.svd import affine_svd, calibrated_svd, plain_svd, spectrum
from edgecompress.moments import Moments, accumulate, output_errors, regularised, regularised_diagonal

SHAPES = st.sampled_from([(5, 9), (9, 5), (6, 6), (4, 3, 3), (3, 2, 2, 2), (8, 1, 1, 2, 2), (2, 2)])


def weight_of(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


def moment_of(width, seed, rank=None):
    """A correlated moment of very different scales; rank-deficient where ``rank`` is given."""
    x = np.random.default_rng(seed).normal(size=(rank or 3 * width, width)) * np.logspace(0, -3, width)
    return Moments("w", (x.T @ x / len(x))[None], len(x))


def as_solved(moments):
    """The moment that the solver minimises under."""
    if moments.is_full:
        return Moments("w", regularised(moments.second_moment[0])[None], moments.count)
    return Moments("w", regularised_diagonal(moments.second_moment[0])[None], moments.count)


def error_of(weight, form, moments):
    return output_errors(weight, form.to_dense(), as_solved(moments))[1]


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_plain_svd_leaves_the_trailing_singular_values(shape, seed, data):
    weight = weight_of(shape, seed)
    values = spectrum(weight)
    rank = data.draw(st.integers(1, len(values)))
    form = plain_svd(weight, rank)
    assert form.left.shape == (shape[0], rank)
    assert form.right.shape == (rank, *shape[1:])
    assert np.sum((weight - form.to_dense()) ** 2) == pytest.approx(np.sum(values[rank:] ** 2), rel=1e-10, abs=1e-20)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 99), st.booleans(), st.data())
def test_calibrated_svd_leaves_the_trailing_eigenvalues_of_the_output(shape, seed, deficient, data):
    weight = weight_of(shape, seed)
    width = weight[0].size
    moments = moment_of(width, seed + 1, rank=2 if deficient else None)
    rank = data.draw(st.integers(1, min(shape[0], width)))
    flat = weight.reshape(shape[0], -1)
    falling = np.linalg.eigvalsh(flat @ as_solved(moments).second_moment[0] @ flat.T)[::-1]
    error = error_of(weight, calibrated_svd(weight, rank, moments), moments)
    assert error == pytest.approx(np.sum(falling[rank:]), rel=1e-9, abs=1e-12 * falling[0])


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 99), st.booleans(), st.data())
def test_calibrated_svd_is_never_worse_than_plain_under_the_moment(shape, seed, full, data):
    weight = weight_of(shape, seed)
    moments = moment_of(weight[0].size, seed + 1)
    if not full:
        moments = Moments("w", moments.diagonal.copy(), moments.count)
    rank = data.draw(st.integers(1, min(shape[0], weight[0].size)))
    best, plain = (
        error_of(weight, form, moments) for form in (calibrated_svd(weight, rank, moments), plain_svd(weight, rank))
    )
    assert best <= plain * (1 + 1e-9) + 1e-12 * output_errors(weight, weight, as_solved(moments))[0]


def test_calibration_gains_where_inputs_differ():
    weight, moments = weight_of((8, 12), 0), moment_of(12, 1)
    assert error_of(weight, calibrated_svd(weight, 3, moments), moments) < 0.5 * error_of(
        weight, plain_svd(weight, 3), moments
    )


@pytest.mark.parametrize("second", [np.eye(6)[None] * 7.0, np.zeros((1, 6, 6)), np.full((1, 6), 3.0), np.zeros((1, 6))])
def test_equal_inputs_and_dead_inputs_give_the_plain_form(second):
    weight = weight_of((5, 6), 2)
    found, plain = calibrated_svd(weight, 3, Moments("w", second, 9)).to_dense(), plain_svd(weight, 3).to_dense()
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-12)


def test_the_diagonal_form_is_that_of_the_diagonal_matrix():
    weight, diagonal = weight_of((5, 6), 2), np.logspace(0, 3, 6)
    found = calibrated_svd(weight, 2, Moments("w", diagonal[None], 9)).to_dense()
    full = calibrated_svd(weight, 2, Moments("w", np.diag(diagonal)[None], 9)).to_dense()
    np.testing.assert_allclose(found, full, rtol=0, atol=1e-12)


def test_a_moment_that_rounding_made_indefinite_is_still_solved():
    weight = weight_of((5, 6), 2)
    second = np.diag([1e6, 1.0, 1.0, 1.0, 1.0, 1.0]) - 2e4 * np.diag([0, 0, 0, 0, 0, 1.0])
    form = calibrated_svd(weight, 4, Moments("w", second[None], 9))
    assert np.isfinite(form.left).all()
    assert np.isfinite(form.right).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_factors_have_the_type_of_the_weight_and_similar_ranges(dtype):
    weight = (weight_of((12, 4, 3, 3), 0) * 1e-2).astype(dtype)
    for form in (plain_svd(weight, 4), calibrated_svd(weight, 4, moment_of(36, 1))):
        assert form.left.dtype == form.right.dtype == dtype
        norms = (
            np.linalg.norm(form.left.astype(float), axis=0),
            np.linalg.norm(form.right.reshape(4, -1).astype(float), axis=1),
        )
        np.testing.assert_allclose(norms[0], norms[1], rtol=5e-3)


def test_the_full_rank_form_is_the_weight():
    weight = weight_of((4, 3, 2), 5).astype(np.float32)
    for form in (plain_svd(weight, 4), calibrated_svd(weight, 4, moment_of(6, 1))):
        np.testing.assert_allclose(form.to_dense(), weight, rtol=0, atol=4e-6)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 99), st.data())
def test_the_plain_form_of_weight_and_bias_is_the_truncated_svd_of_both(shape, seed, data):
    weight, bias = weight_of(shape, seed), weight_of(shape[:1], seed + 1)
    both = np.hstack([weight.reshape(shape[0], -1), bias[:, None]])
    values = np.linalg.svd(both, compute_uv=False)
    form = affine_svd(weight, bias, data.draw(st.integers(1, len(values))))
    found = np.hstack([form.to_dense().reshape(shape[0], -1), form.bias_to_dense()[:, None]])
    assert form.to_dense().shape == shape
    assert np.sum((both - found) ** 2) == pytest.approx(np.sum(values[form.rank :] ** 2), rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("full", [True, False])
def test_the_calibrated_form_of_weight_and_bias_leaves_the_least_output_error(full):
    """Of all forms of that rank, known from the eigenvalues of the second moment of the outputs."""
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(6, 8)), rng.normal(size=6)
    # Inputs as the solver takes them: with the covariance that it regularises to, or inputs without correlation.
    mean, deviation = rng.normal(size=8) * 3, np.diag(np.logspace(0, -2, 8)) @ rng.normal(size=(8, 8))
    second = (deviation @ deviation.T if full else np.diag(np.logspace(0, -2, 8))) + np.outer(mean, mean)
    moments = Moments("w", (second if full else np.diagonal(second))[None], 9, mean[None])
    covariance = regularised(second - np.outer(mean, mean))
    augmented = np.block([[covariance + np.outer(mean, mean), mean[:, None]], [mean[None], np.ones((1, 1))]])
    both = np.hstack([weight, bias[:, None]])
    falling = np.linalg.eigvalsh(both @ augmented @ both.T)[::-1]
    for rank in range(1, 6):
        form = affine_svd(weight, bias, rank, moments)
        wrong = both - np.hstack([form.to_dense(), form.bias_to_dense()[:, None]])
        assert np.sum(wrong @ augmented * wrong) == pytest.approx(np.sum(falling[rank:]), rel=1e-8)


def test_the_bias_takes_part_where_it_and_the_mean_matter():
    rng = np.random.default_rng(4)
    weight, bias = rng.normal(size=(10, 13)), 3 * rng.normal(size=10)
    x = rng.normal(size=(500, 13)) + 2 * rng.normal(size=13)
    moments = accumulate(None, "w", x[:, None], full=True)
    errors = {}
    for name, form in (("plain", affine_svd(weight, bias, 2)), ("known", affine_svd(weight, bias, 2, moments))):
        errors[name] = np.mean((x @ (weight - form.to_dense()).T + bias - form.bias_to_dense()) ** 2)
    apart = calibrated_svd(weight, 2, moments)
    errors["apart"] = np.mean((x @ (weight - apart.to_dense()).T) ** 2)
    assert errors["known"] < errors["plain"]
    # The bias kept apart costs no rank but ten more values: 46 and 10 against 48.
    assert apart.parameters + 10 > affine_svd(weight, bias, 2).parameters == 48
    assert errors["apart"] < errors["known"]


def test_a_bias_or_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"the weight needs \(5,\)"):
        affine_svd(weight_of((5, 9), 0), np.ones(4), 2)
    with pytest.raises(ValueError, match=r"1 \.\. 4"):
        affine_svd(weight_of((5, 3), 0), np.ones(5), 5)
    with pytest.raises(ValueError, match="ungrouped"):
        affine_svd(weight_of((4, 3), 0), np.ones(4), 2, Moments("w", np.ones((2, 3, 3)), 1))


def test_a_zero_weight_gives_finite_factors():
    weight = np.zeros((4, 5), np.float32)
    for form in (plain_svd(weight, 2), calibrated_svd(weight, 2, moment_of(5, 1))):
        assert not form.to_dense().any()
        assert np.isfinite(form.left).all()


def test_parameters_and_rank_are_those_of_the_factors():
    form = plain_svd(weight_of((5, 2, 3), 0), 2)
    assert (form.rank, form.parameters) == (2, 2 * (5 + 6))


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_rank_outside_the_range_is_refused(rank):
    with pytest.raises(ValueError, match=r"1 \.\. 5"):
        plain_svd(weight_of((5, 9), 0), rank)
    with pytest.raises(ValueError, match=r"1 \.\. 5"):
        calibrated_svd(weight_of((5, 9), 0), rank, moment_of(9, 0))


def test_moments_of_a_grouped_layer_are_refused():
    with pytest.raises(ValueError, match="ungrouped"):
        calibrated_svd(weight_of((4, 3), 0), 2, Moments("w", np.ones((2, 3, 3)), 1))
