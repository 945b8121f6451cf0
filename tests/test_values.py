from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from builders import normal

from edgecompress.cluster.kmeans import kmeans
from edgecompress.factorize.factors import factors, features, first_columns
from edgecompress.factorize.solve import solve_layer
from edgecompress.moments import Moments, output_errors, regularised
from edgecompress.values import quantise_form

RANKS = {"svd": (5,), "svd_in": (4,), "separable": (6,), "tucker2": (4, 5), "cp": (9,), "svd_bias": (5,)}
WEIGHT = normal(8, 6, 3, 3)


def moments_of(groups=1, width=54, seed=3):
    x = np.random.default_rng(seed).normal(size=(400, groups, width)) * np.logspace(-1, 1, width)
    mixed = x + 0.5 * np.roll(x, 1, axis=2)
    return Moments("w", np.einsum("pga,pgb->gab", mixed, mixed) / 400, 400, mixed.mean(axis=0))


def form_of(name, moments=None):
    return solve_layer(name, WEIGHT, RANKS[name], moments, bias=normal(8, seed=5))


def clusters(count, weight, moments):
    """Nearest of ``count`` values; the diagonal of the moment says what counts."""
    if moments is None:
        return kmeans(weight, count)
    return kmeans(weight, count, np.broadcast_to(moments.diagonal[0].reshape(weight.shape[1:]), weight.shape))


def is_any(factor):
    return factor.size > 0


@pytest.mark.parametrize("name", RANKS)
def test_the_last_factor_times_its_features_is_the_weight(name):
    form = form_of(name)
    last = factors(form)[-1].reshape(8, -1).astype(np.float64)
    # factors are float32, and so is what they multiply out to: 1e-6 of the largest
    np.testing.assert_allclose(last @ features(form), form.to_dense().reshape(8, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["svd_in", "separable", "tucker2", "cp"])
def test_what_enters_the_first_factor_has_the_mean_moment_over_the_rest_of_the_kernel(name):
    x = normal(50, 54).astype(np.float64)
    points = {"separable": 3}.get(name, 9)
    entering = np.moveaxis(x.reshape(50, -1, points), 2, 1).reshape(50 * points, -1)
    found = first_columns(form_of(name), x.T @ x / 50)
    np.testing.assert_allclose(found, entering.T @ entering / len(entering), rtol=1e-10)


@pytest.mark.parametrize("name", RANKS)
def test_the_last_factor_makes_up_for_the_errors_of_the_others(name):
    moments = moments_of()
    form = form_of(name, moments)
    solved, values = quantise_form(form, WEIGHT, moments, partial(clusters, 8), pays_off=is_any)
    alone, _ = quantise_form(form, WEIGHT, None, partial(clusters, 8), pays_off=is_any)
    before, after, by_itself = (output_errors(WEIGHT, each.to_dense(), moments)[1] for each in (form, solved, alone))
    assert after - before < 0.8 * (by_itself - before)
    for array, own in zip(factors(solved), values, strict=True):
        assert len(np.unique(array)) <= 8
        np.testing.assert_array_equal(array, own.to_dense())


def test_a_factor_too_small_for_few_values_stays_and_the_last_is_solved_for_the_others():
    moments = moments_of()
    form = form_of("svd", moments)
    wide = quantise_form(form, WEIGHT, moments, partial(clusters, 4), pays_off=lambda part: part.size > 100)
    (solved, values), damped = wide, regularised(moments.second_moment[0])
    assert [own is None for own in values] == [False, True]
    entering = features(solved)
    expected = np.linalg.lstsq(
        np.linalg.cholesky(entering @ damped @ entering.T).T,
        np.linalg.solve(
            np.linalg.cholesky(entering @ damped @ entering.T), entering @ damped @ WEIGHT.reshape(8, -1).T
        ),
        rcond=None,
    )[0].T
    # the ridge is 1e-6 of the mean: 1e-4 of the largest entry for features of a condition of 100
    np.testing.assert_allclose(solved.left, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "ranks", "groups"), [("spectral", (6, 10), 1), ("svd", (3,), 2)])
def test_coefficients_and_factors_of_groups_count_by_themselves(name, ranks, groups):
    weight = normal(8, 6, 3, 3)
    form = solve_layer(name, weight, ranks, None, groups=groups)
    moments = moments_of(groups)
    seen = []

    def assign(weight, moments):
        seen.append(moments)
        return kmeans(weight, 4)

    solved, values = quantise_form(form, weight, moments, assign, pays_off=is_any)
    assert seen == [None] * len(values)
    for array, own in zip(factors(solved), values, strict=True):
        np.testing.assert_array_equal(array, own.to_dense())
