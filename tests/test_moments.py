from __future__ import annotations

import numpy as np
import pytest

from edgecompress.moments import (
    Moments,
    accumulate,
    accumulate_pair,
    centred,
    centred_pair,
    output_errors,
    refitted,
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


def pair_of(positions=400, groups=1, width=5, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(positions, groups, width)) + 1.0
    q = 0.8 * x + 0.3 * generator.normal(size=x.shape) + 0.2
    found = None
    for rows in np.array_split(np.arange(positions), 3):
        found = accumulate_pair(found, "w", x[rows].astype(np.float32), q[rows].astype(np.float32), full=True)
    return found, x, q


def test_a_pair_holds_the_moments_of_both_inputs():
    pair, x, q = pair_of(groups=2)
    for group in range(2):
        # float32 products of 400 rows: 400 * 2^-24 of about 2 at most
        np.testing.assert_allclose(pair.cross[group], x[:, group].T @ q[:, group] / len(x), rtol=0, atol=1e-4)
    np.testing.assert_allclose(pair.moments.mean, q.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(pair.source_mean, x.mean(axis=0), rtol=1e-5)
    covariances = centred_pair(pair)
    for group in range(2):
        expected = (x[:, group] - x[:, group].mean(0)).T @ (q[:, group] - q[:, group].mean(0)) / len(x)
        np.testing.assert_allclose(covariances.cross[group], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("centre", [False, True])
def test_the_refitted_weight_is_the_best_on_what_the_compressed_model_gives(centre):
    pair, x, q = pair_of(groups=2)
    if centre:
        pair, x, q = centred_pair(pair), x - x.mean(axis=0), q - q.mean(axis=0)
    weight = np.random.default_rng(1).normal(size=(6, 5))

    def loss(candidate):
        total = 0.0
        for group, rows in enumerate((slice(0, 3), slice(3, 6))):
            damping = 0.01 * np.mean(np.diagonal(pair.moments.second_moment[group]))
            wrong = x[:, group] @ weight[rows].T - q[:, group] @ candidate[rows].T
            total += np.mean(np.sum(wrong**2, axis=1)) + damping * np.sum((candidate[rows] - weight[rows]) ** 2)
        return total

    best = refitted(weight, pair)
    assert loss(best) < 0.95 * loss(weight)
    generator = np.random.default_rng(2)
    for _ in range(20):
        assert loss(best + 0.05 * generator.normal(size=best.shape)) > loss(best)


def test_what_a_form_of_the_refitted_weight_loses_is_what_it_adds_to_the_loss():
    pair, x, q = pair_of()
    weight, form = (np.random.default_rng(seed).normal(size=(3, 5)) for seed in (3, 4))
    best = refitted(weight, pair)
    damped = regularised(pair.moments.second_moment[0])
    excess = 0.01 * np.mean(np.diagonal(pair.moments.second_moment[0]))

    def loss(candidate):
        wrong = x[:, 0] @ weight.T - q[:, 0] @ candidate.T
        return np.mean(np.sum(wrong**2, axis=1)) + excess * np.sum((candidate - weight) ** 2)

    lost = np.trace((best - form) @ damped @ (best - form).T)
    # the moments were summed in float32: 1e-5 of the loss
    assert loss(form) - loss(best) == pytest.approx(lost, rel=1e-4)


def test_without_errors_before_it_a_weight_stays_what_it_is():
    _, x, _ = pair_of()
    same = x.astype(np.float32)
    pair = accumulate_pair(None, "w", same, same, full=True)
    weight = np.random.default_rng(1).normal(size=(3, 5))
    np.testing.assert_allclose(refitted(weight, pair), weight, rtol=0, atol=1e-6)


def test_inputs_that_are_always_zero_leave_a_weight_as_it_is():
    zeros = np.zeros((10, 1, 4), np.float32)
    weight = np.random.default_rng(1).normal(size=(3, 4))
    np.testing.assert_allclose(refitted(weight, accumulate_pair(None, "w", zeros, zeros, full=True)), weight)


def test_with_the_diagonal_alone_a_weight_is_not_refitted():
    _, x, q = pair_of()
    pair = accumulate_pair(None, "w", x.astype(np.float32), q.astype(np.float32), full=False)
    weight = np.ones((3, 5))
    assert refitted(weight, pair) is weight
    assert pair.cross is None
