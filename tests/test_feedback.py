from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.cluster import refit
from edgecompress.cluster.feedback import assign, eliminate
from edgecompress.cluster.forms import Clustered
from edgecompress.cluster.kmeans import kmeans
from edgecompress.cluster.refit import refit_codebook
from edgecompress.moments import Moments, regularised

SEEDS = st.integers(0, 2**32 - 1)


def moments_of(rng, groups, width, *, rows=None):
    """The moment of inputs of very different sizes that hang together; singular where there are few rows."""
    patches = rng.normal(size=(groups, rows or 3 * width, width)) @ rng.normal(size=(groups, width, width))
    patches *= np.exp(rng.normal(size=width))
    return Moments("w", np.matmul(patches.swapaxes(1, 2), patches) / patches.shape[1], patches.shape[1])


def damped(moments):
    return np.stack([regularised(each) for each in moments.second_moment])


def loss(weight, values, moments):
    groups = moments.second_moment.shape[0]
    error = (weight.astype(np.float64) - values).reshape(groups, weight.shape[0] // groups, -1)
    return float(np.sum(np.matmul(error, damped(moments)) * error))


def by_definition(weight, moment, rule):
    """Frantar et al. 2022, one column after the other, with the inverse of the moment of what is left."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    current, left = weight.astype(np.float64).copy(), list(order)
    for column in order:
        inverse = np.linalg.inv(regularised(moment)[np.ix_(left, left)])
        place = left.index(column)
        chosen = rule(current[:, column])
        scaled = (current[:, column] - chosen) / inverse[place, place]
        current[:, left] -= scaled[:, None] * inverse[place]
        current[:, column] = chosen
        left.remove(column)
    return current


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 12), st.integers(1, 5))
def test_it_is_the_update_by_the_inverse_moment_of_the_columns_left(seed, width, outputs):
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(outputs, width)), moments_of(rng, 1, width)
    expected = by_definition(weight, moments.second_moment[0], np.rint)
    assert np.array_equal(assign(weight, eliminate(moments, np.float64), np.rint), expected)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(1, 150))
def test_the_loss_is_the_sum_of_what_each_column_misses_by_its_energy(seed, groups, width):
    """An identity that holds for whatever a rule chooses; it fails if any column's feedback is wrong, across blocks."""
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(2 * groups, width)), moments_of(rng, groups, width)
    elimination, missed = eliminate(moments, np.float64), []

    def rule(values):
        missed.append(values - np.rint(values))
        return np.rint(values)

    values = assign(weight, elimination, rule)
    expected = sum(float(elimination.energies[:, k] @ (each**2).sum(axis=1)) for k, each in enumerate(missed))
    assert loss(weight, values, moments) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(1, 90))
def test_float32_feedback_loses_what_float64_feedback_does(seed, groups, width):
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(8 * groups, width)).astype(np.float32) * 3, moments_of(rng, groups, width)
    found = [loss(weight, assign(weight, eliminate(moments, kind), np.rint), moments) for kind in (np.float32, float)]
    # a value at the edge between two integers may go either way, which then changes all that follow
    assert found[0] == pytest.approx(found[1], rel=0.25)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_moment_without_correlation_gives_the_nearest_values(seed):
    rng = np.random.default_rng(seed)
    weight, diagonal = rng.normal(size=(6, 5)).astype(np.float32) * 4, rng.random((2, 5)) + 0.1
    full = np.stack([np.diag(each) for each in diagonal])
    for second_moment in (full, diagonal):
        found = assign(weight, eliminate(Moments("w", second_moment, 1)), np.rint)
        assert np.array_equal(found, np.rint(weight))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(2, 40))
def test_the_order_of_the_inputs_does_not_matter(seed, width):
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(3, width)), moments_of(rng, 1, width)
    turn = rng.permutation(width)
    turned = Moments("w", moments.second_moment[:, turn][:, :, turn], 1)
    found = assign(weight[:, turn], eliminate(turned, np.float64), np.rint)
    assert np.array_equal(found, assign(weight, eliminate(moments, np.float64), np.rint)[:, turn])


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_last_column_is_the_best_that_the_others_allow(seed):
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(1, 4)) * 2, moments_of(rng, 1, 4)
    values = assign(weight, eliminate(moments, np.float64), np.rint)
    last = int(np.argmin(moments.diagonal[0]))
    for shift in (-1.0, 1.0):
        other = values.copy()
        other[0, last] += shift
        assert loss(weight, values, moments) <= loss(weight, other, moments) * (1 + 1e-9)


def test_on_the_whole_it_loses_far_less_than_the_nearest_values():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(20):
        weight, moments = rng.normal(size=(16, 60)), moments_of(rng, 1, 60)
        values = assign(weight, eliminate(moments), np.rint)
        ratios.append(loss(weight, values, moments) / loss(weight, np.rint(weight), moments))
    assert max(ratios) < 0.8
    assert np.median(ratios) < 0.4


def test_groups_are_assigned_each_under_its_own_moment():
    rng = np.random.default_rng(1)
    weight, moments = rng.normal(size=(12, 2, 3, 3)), moments_of(rng, 4, 18)
    found = assign(weight, eliminate(moments, np.float64), np.rint)
    for group in range(4):
        alone = Moments("w", moments.second_moment[group : group + 1], 1)
        rows = slice(3 * group, 3 * group + 3)
        assert np.array_equal(found[rows], assign(weight[rows], eliminate(alone, np.float64), np.rint))


def test_dead_inputs_and_fewer_rows_than_inputs_do_no_harm():
    rng = np.random.default_rng(2)
    moments = moments_of(rng, 1, 40, rows=5)
    moments.second_moment[0, 7] = moments.second_moment[0, :, 7] = 0.0
    weight = rng.normal(size=(4, 40))
    found = assign(weight, eliminate(moments), np.rint)
    assert np.array_equal(found[:, 7], np.rint(weight[:, 7]))  # nothing hangs together with a dead input
    assert loss(weight, found, moments) < loss(weight, np.rint(weight), moments)
    nothing = eliminate(Moments("w", np.zeros((1, 40, 40)), 1))
    assert np.array_equal(assign(weight, nothing, np.rint), np.rint(weight))


def test_a_moment_that_rounding_made_indefinite_is_damped_more_and_another_refused():
    slightly = np.array([[[1.0, 1.05], [1.05, 1.0]]])
    weight = np.array([[0.4, 0.4]])
    assert np.isfinite(assign(weight, eliminate(Moments("w", slightly, 1)), np.rint)).all()
    with pytest.raises(ValueError, match="semidefinite"):
        eliminate(Moments("w", np.array([[[1.0, 50.0], [50.0, 1.0]]]), 1))


def test_where_it_is_not_kept_a_value_is_zero_and_the_others_make_up_for_it():
    rng = np.random.default_rng(3)
    weight, moments, keep = rng.normal(size=(8, 30)), moments_of(rng, 1, 30), rng.random((8, 30)) < 0.5
    elimination = eliminate(moments, np.float64)
    found = assign(weight, elimination, lambda values: values, keep)
    assert np.array_equal(found != 0, keep)
    assert loss(weight, found, moments) < loss(weight, np.where(keep, weight, 0), moments)
    diagonal = eliminate(Moments("w", moments.diagonal, 1))
    assert np.array_equal(assign(weight, diagonal, np.rint, keep), np.where(keep, np.rint(weight), 0))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_values_have_the_type_and_shape_of_the_weight(kind):
    rng = np.random.default_rng(4)
    weight, moments = rng.normal(size=(4, 3, 2, 2)).astype(kind), moments_of(rng, 2, 12)
    elimination = eliminate(moments)
    before = weight.copy()
    found = assign(weight, elimination, np.rint)
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    assert np.array_equal(weight, before)
    assert found.tobytes() == assign(weight, eliminate(moments), np.rint).tobytes()


def design(form, moments):
    """Rows of a least squares problem in the codebook: the root of the moment times where each value is used."""
    groups = moments.second_moment.shape[0]
    roots = np.linalg.cholesky(damped(moments))
    columns = []
    for index in range(form.codebook.size):
        used = (form.indices == index).astype(float).reshape(groups, -1, roots.shape[1])
        columns.append(np.matmul(used, roots).reshape(-1))
    return np.stack(columns, axis=1), roots


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 3), st.integers(2, 6))
def test_the_codebook_is_that_of_least_squares_under_the_moment(seed, groups, clusters):
    rng = np.random.default_rng(seed)
    weight, moments = rng.normal(size=(4 * groups, 10)), moments_of(rng, groups, 10)
    form = kmeans(weight, clusters)
    matrix, roots = design(form, moments)
    target = np.matmul(weight.reshape(groups, -1, 10), roots).reshape(-1)
    expected = np.linalg.lstsq(matrix, target, rcond=None)[0]
    found = refit_codebook(weight, form, moments)
    # sums in float32; the system is as well posed as the damping and the sizes of the inputs make it
    np.testing.assert_allclose(found.to_dense(), expected[form.indices], rtol=2e-3, atol=2e-4)
    assert (np.diff(found.codebook) >= 0).all()
    assert loss(weight, found.to_dense(), moments) <= loss(weight, form.to_dense(), moments) * (1 + 1e-5)


def test_a_codebook_of_a_large_layer_is_fitted_to_some_of_its_channels(monkeypatch):
    rng = np.random.default_rng(7)
    weight, moments = rng.normal(size=(512, 20)), moments_of(rng, 2, 20)
    form = kmeans(weight, 4)
    whole = refit_codebook(weight, form, moments)
    monkeypatch.setattr(refit, "_WORK_LIMIT_MACS", 4 * weight.size * 20 // 8)
    found = refit_codebook(weight, form, moments)
    rows = np.r_[0:256:8, 256:512:8]
    some = refit_codebook(weight[rows], Clustered(form.codebook, form.indices[rows]), moments)
    assert np.array_equal(found.codebook, some.codebook)
    assert loss(weight, found.to_dense(), moments) < loss(weight, whole.to_dense(), moments) * 1.05
    # a value that none of them has stays what it was
    lone = form.indices.copy()
    lone[lone == 3] = 2
    lone[1, 0] = 3
    assert refit_codebook(weight, Clustered(form.codebook, lone), moments).to_dense()[1, 0] == form.codebook[3]


def test_a_codebook_keeps_its_zero_and_rises_even_where_the_best_values_cross():
    rng = np.random.default_rng(5)
    weight, moments = rng.normal(size=(6, 8)).astype(np.float32), moments_of(rng, 1, 8)
    codebook = np.array([-1.0, -0.5, 0.0, 2.0], np.float32)
    form = Clustered(codebook, rng.integers(0, 4, weight.shape).astype(np.uint8))
    found = refit_codebook(weight, form, moments)
    assert (np.diff(found.codebook) > 0).all()
    assert np.array_equal(found.to_dense() == 0, form.indices == 2)
    # members stay together, whatever their new place
    assert len(set(zip(form.indices.ravel(), found.indices.ravel(), strict=True))) == 4
    empty = Clustered(np.zeros(1, np.float32), np.zeros((6, 8), np.uint8))
    assert refit_codebook(weight, empty, moments).codebook.tolist() == [0.0]
