from __future__ import annotations

import numpy as np
import pytest

from edgecompress.moments import (
    Moments,
    accumulate,
    centred,
    output_errors,
    regularised,
    regularised_diagonal,
    sqnr_db,
)


def samples(positions=500, groups=2, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(positions, groups, width)).astype(np.float32)


def test_the_moment_is_the_mean_outer_product_of_each_group():
    x = samples()
    moments = accumulate(None, "w", x, full=True)
    assert moments.count == len(x)
    for group in range(2):
        rows = x[:, group].astype(np.float64)
        # float32 products of 500 rows: 500 * 2^-24 at most
        np.testing.assert_allclose(moments.second_moment[group], rows.T @ rows / len(x), rtol=0, atol=5e-5)


def test_batches_of_different_sizes_give_what_one_batch_gives():
    x = samples(1000)
    whole, parts = accumulate(None, "w", x, full=True), None
    for part in np.split(x, [1, 300, 650]):
        parts = accumulate(parts, "w", part, full=True)
    assert parts.count == whole.count
    np.testing.assert_allclose(parts.second_moment, whole.second_moment, rtol=0, atol=5e-6)


def test_the_diagonal_alone_is_the_diagonal_of_the_full_moment():
    x = samples()
    full, diagonal = (accumulate(None, "w", x, full=each) for each in (True, False))
    assert full.is_full
    assert not diagonal.is_full
    np.testing.assert_allclose(diagonal.diagonal, full.diagonal, rtol=1e-5)


@pytest.mark.parametrize("full", [True, False])
def test_products_that_overflow_float32_are_formed_in_float64(full):
    moments = accumulate(None, "w", np.full((3, 1, 2), 1e30, np.float32), full=full)
    np.testing.assert_allclose(moments.second_moment, 1e60, rtol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_the_mean_taken_out_of_the_second_moment_leaves_the_covariance(full):
    x = samples() + np.float32(3.0)
    moments = None
    for part in np.split(x, [100, 250]):
        moments = accumulate(moments, "w", part, full=full)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-5)
    covariance = np.stack([np.cov(x[:, group].T.astype(float), bias=True) for group in range(2)])
    expected = covariance if full else np.diagonal(covariance, axis1=1, axis2=2)
    np.testing.assert_allclose(centred(moments).second_moment, expected, rtol=0, atol=1e-4)


def test_regularising_adds_one_percent_of_the_mean_diagonal():
    found = regularised(np.diag([1.0, 3.0]))
    np.testing.assert_allclose(found, np.diag([1.02, 3.02]))
    np.testing.assert_allclose(regularised_diagonal(np.array([1.0, 3.0])), [1.02, 3.02])


def test_a_dead_input_becomes_the_plain_problem():
    np.testing.assert_array_equal(regularised(np.zeros((3, 3))), np.eye(3))
    np.testing.assert_array_equal(regularised_diagonal(np.zeros(3)), np.ones(3))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("full", [True, False])
def test_output_errors_are_the_energies_of_the_outputs(groups, full):
    rng = np.random.default_rng(1)
    weight, wrong = rng.normal(size=(2, 4, 3, 2))
    x = rng.normal(size=(400, groups, 6))
    if not full:  # independent inputs: the off-diagonal part is zero by construction
        x = np.eye(6)[rng.integers(6, size=400)][:, None] * rng.normal(size=(400, groups, 1))
    moments = accumulate(None, "w", x, full=full)

    def energy(rows):
        grouped = rows.reshape(groups, 4 // groups, 6)
        return np.mean(np.sum(np.einsum("god,ngd->ngo", grouped, x) ** 2, axis=(1, 2)))

    signal, error = output_errors(weight, wrong, moments)
    assert signal == pytest.approx(energy(weight))
    assert error == pytest.approx(energy(weight - wrong))


def test_sqnr_is_unknown_where_there_is_no_signal_or_no_error():
    assert sqnr_db(100.0, 1.0) == pytest.approx(20.0)
    assert sqnr_db(1.0, 0.0) is None
    assert sqnr_db(0.0, 1.0) is None
    assert sqnr_db(float("nan"), 1.0) is None


def test_moments_are_values():
    moments = Moments("w", np.ones((1, 2, 2)), 1)
    with pytest.raises(AttributeError):
        moments.count = 2
