from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgecompress.cluster.codebook import to_codebook
from edgecompress.cluster.feedback import eliminate
from edgecompress.cluster.grid import grid_step, to_grid
from edgecompress.cluster.prune import keep_mask, prune
from edgecompress.moments import Moments, output_errors, regularised

SALIENCIES = st.integers(1, 60).flatmap(lambda size: arrays(np.float64, size, elements=st.integers(0, 9)))


def layer(seed=0, groups=2, outputs=8, width=18):
    rng = np.random.default_rng(seed)
    patches = rng.normal(size=(groups, 100, width)) @ rng.normal(size=(groups, width, width))
    moments = Moments("w", np.matmul(patches.swapaxes(1, 2), patches) / 100, 100)
    return rng.normal(size=(outputs, width // 9, 3, 3)).astype(np.float32), moments


@settings(max_examples=60, deadline=None)
@given(SALIENCIES, st.floats(0, 1))
def test_the_share_is_exact_and_the_least_go_first(saliency, share):
    keep = keep_mask(saliency, share)
    assert np.count_nonzero(~keep) == round(share * saliency.size)
    if keep.any() and not keep.all():
        assert saliency[keep].min() >= saliency[~keep].max()


def test_without_moments_it_is_the_magnitude():
    weight = np.array([[0.1, -5.0, 0.0], [-0.2, 0.3, 4.0]], np.float32)
    assert prune(weight, 0.5).tolist() == [[0.0, -5.0, 0.0], [0.0, weight[1, 1], 4.0]]
    assert np.array_equal(prune(weight, 0.0), weight)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_calibrated_pruning_loses_less_than_that_by_magnitude(share):
    for seed in range(8):
        weight, moments = layer(seed)
        calibrated, plain = prune(weight, share, moments), prune(weight, share)
        for values in (calibrated, plain):
            assert np.count_nonzero(values == 0) == round(share * weight.size)
        assert output_errors(weight, calibrated, moments)[1] < 0.8 * output_errors(weight, plain, moments)[1]


def best_values(weight, keep, moments):
    """The least squares of every row in the columns that it keeps."""
    found = np.zeros((len(moments.second_moment), weight.shape[0] // 2, 18))
    for group, moment in enumerate(map(regularised, moments.second_moment)):
        for row, (own, kept) in enumerate(
            zip(weight.reshape(2, -1, 18)[group], keep.reshape(2, -1, 18)[group], strict=True)
        ):
            found[group, row, kept] = np.linalg.solve(moment[np.ix_(kept, kept)], (moment @ own)[kept])
    return found.reshape(weight.shape)


def damped_loss(weight, values, moments):
    damped = np.stack([regularised(each) for each in moments.second_moment])
    return output_errors(weight, values, Moments("w", damped, 1))[1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_what_stays_is_corrected_almost_to_the_best(share):
    for seed in range(4):
        weight, moments = layer(seed)
        values = prune(weight, share, moments)
        best = damped_loss(weight, best_values(weight, values != 0, moments), moments)
        # eight steps a stage, each stage going on from the one before, leave a few percent
        assert best * (1 - 1e-5) <= damped_loss(weight, values, moments) < 1.1 * best


def test_inputs_that_do_not_hang_together_correct_nothing():
    weight, moments = layer()
    squares = np.stack([np.diag(each) for each in moments.diagonal])
    for known in (Moments("w", moments.diagonal, 1), Moments("w", squares, 1)):
        found = prune(weight, 0.5, known)
        stays = found != 0
        # steps of a length zero but for rounding
        np.testing.assert_allclose(found[stays], weight[stays], rtol=1e-5)
        assert np.array_equal(stays, prune(weight, 0.5, Moments("w", moments.diagonal, 1)) != 0)


def test_a_dead_layer_is_pruned_by_magnitude():
    weight, _ = layer()
    assert np.array_equal(prune(weight, 0.5, Moments("w", np.zeros((2, 18, 18)), 1)), prune(weight, 0.5))


def test_the_type_stays_and_the_input_is_not_written_to():
    weight, moments = layer()
    half = weight.astype(np.float16)
    before = half.copy()
    assert prune(half, 0.5, moments).dtype == np.float16
    assert np.array_equal(half, before)


def test_what_is_pruned_stays_zero_in_a_grid_and_in_a_codebook():
    weight, moments = layer()
    elimination, pruned = eliminate(moments), prune(weight, 0.6, moments)
    keep = pruned != 0
    grid = to_grid(pruned, grid_step(weight, 0.5), elimination, keep=keep)
    clusters = to_codebook(pruned, 8, moments, elimination, keep=keep)
    assert (grid.codes[~keep] == 0).all()
    assert np.count_nonzero(clusters.codebook == 0) == 1
    assert clusters.codebook.size <= 8
    for values in (grid.to_dense(), clusters.to_dense()):
        assert (values[~keep] == 0).all()
        assert np.count_nonzero(values[keep]) > 0.5 * np.count_nonzero(keep)
        # what rounding adds stays small beside what pruning cost
        assert damped_loss(weight, values, moments) < 1.5 * damped_loss(weight, pruned, moments)


def test_all_may_go():
    weight, moments = layer()
    pruned = prune(weight, 1.0, moments)
    assert not pruned.any()
    form = to_codebook(pruned, 4, moments, eliminate(moments), keep=pruned != 0)
    assert form.codebook.tolist() == [0.0]
    with pytest.raises(ValueError, match=r"2 \.\. 256"):
        to_codebook(weight, 1, moments, eliminate(moments), keep=pruned != 0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match=r"0 \.\. 1"):
        prune(np.ones((3, 1)), share)
