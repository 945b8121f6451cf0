from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgecompress.cluster.feedback import eliminate
from edgecompress.cluster.forms import Grid
from edgecompress.cluster.grid import entropy_bits, grid_step, to_grid
from edgecompress.moments import Moments

WEIGHTS = st.tuples(st.integers(1, 5), st.integers(1, 9)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.floats(0.05, 2.0), st.booleans())
def test_every_weight_is_within_half_a_step(weight, sigmas, per_channel):
    step = grid_step(weight, sigmas, per_channel=per_channel)
    form = to_grid(weight, step)
    away = np.abs(form.to_dense().astype(np.float64) - weight)
    # quotient and product are rounded in float32: 127 steps times two roundings
    assert (away <= 0.5 * step + 127 * step * 2.0**-22).all()
    assert step.dtype == form.to_dense().dtype == np.float32
    assert step.shape == ((weight.shape[0], 1) if per_channel else ())


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, st.floats(0.05, 2.0))
def test_a_grid_is_on_its_own_grid(weight, sigmas):
    form = to_grid(weight, grid_step(weight, sigmas))
    assert np.array_equal(to_grid(form.to_dense(), form.step).codes, form.codes)


def test_a_step_is_in_units_of_the_root_mean_square_of_all_or_of_a_channel():
    weight = np.array([[3.0, -3.0, 3.0, 3.0], [1.0, 1.0, -1.0, 1.0]], np.float32)
    assert grid_step(weight, 0.5) == pytest.approx(0.5 * math.sqrt(5))
    np.testing.assert_allclose(grid_step(weight, 0.5, per_channel=True), [[1.5], [0.5]])


def test_a_step_is_never_so_small_that_a_code_would_not_fit():
    weight = np.zeros((2, 10_000), np.float32)
    weight[0, 0] = 254.0
    assert grid_step(weight, 1.0) == 2.0
    assert to_grid(weight, grid_step(weight, 1.0)).codes.max() == 127
    # the root mean square of the first channel is 254 / sqrt(10,000); the second is all zero
    np.testing.assert_allclose(grid_step(weight, 1.0, per_channel=True), [[2.54], [1.0]], rtol=1e-6)
    assert grid_step(np.zeros((2, 3), np.float16), 1.0).dtype == np.float16


def test_codes_end_at_127_on_both_sides():
    form = to_grid(np.array([[-1e3, -127.4, 126.6, 1e3]], np.float32), np.float32(1.0).reshape(()))
    assert form.codes.tolist() == [[-127, -127, 127, 127]]
    assert form.codes.dtype == np.int8


def test_small_weights_of_inputs_that_are_always_zero_cost_nothing():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(500, 1, 12))
    x[:, :, 8:] = 0.0  # dead
    moments = Moments("w", np.einsum("pga,pgb->gab", x, x) / 500, 500)
    weight = rng.normal(size=(20, 12)).astype(np.float32)
    step = np.float32(1.0).reshape(())
    codes = to_grid(weight, step, eliminate(moments)).codes
    # damping leaves a dead input about 1 % of the energy of the others: only weights above 1.6 steps count there
    assert np.count_nonzero(codes[:, 8:]) <= np.count_nonzero(np.abs(weight[:, 8:]) > 1.4)
    assert np.count_nonzero(codes[:, 8:]) < np.count_nonzero(np.rint(weight[:, 8:]))
    alive = np.count_nonzero(codes[:, :8]) / np.count_nonzero(np.rint(weight[:, :8]))
    assert 0.9 < alive < 1.1


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("per_channel", [False, True])
def test_with_feedback_what_was_fed_back_is_the_error_of_the_dense_form(kind, per_channel):
    """Assigning the dense form again, of which nothing is left to feed back, must give the same codes."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(8, 3, 3)).astype(kind)
    patches = rng.normal(size=(2, 50, 9)) @ rng.normal(size=(2, 9, 9))
    elimination = eliminate(Moments("w", np.matmul(patches.swapaxes(1, 2), patches) / 50, 50))
    keep = rng.random(weight.shape) < 0.7
    form = to_grid(weight, grid_step(weight, 1.3, per_channel=per_channel), elimination, keep=keep)
    assert form.step.dtype == form.to_dense().dtype == kind
    assert (form.codes[~keep] == 0).all()
    assert np.abs(form.codes[keep]).max() > 0
    assert not np.array_equal(form.codes, to_grid(weight, form.step, keep=keep).codes)
    assert np.array_equal(to_grid(form.to_dense(), form.step, elimination).codes, form.codes)


def test_a_mask_without_feedback_makes_zeros():
    weight, keep = np.array([[3.0, 2.0, -4.0]], np.float32), np.array([[True, False, True]])
    assert to_grid(weight, np.float32(1.0).reshape(()), keep=keep).codes.tolist() == [[3, 0, -4]]


def test_a_gain_scales_the_step_and_leaves_the_codes():
    form = Grid(np.array([[0.5], [2.0]], np.float32), np.array([[1, -2], [3, 0]], np.int8))
    scaled = form.scaled(1.5)
    assert scaled.codes is form.codes
    assert scaled.step.dtype == np.float32
    assert scaled.to_dense().tolist() == [[0.75, -1.5], [9.0, 0.0]]
    assert Grid(np.float32(0.5).reshape(()), form.codes).scaled(2.0).step.shape == ()


def test_entropy_is_that_of_the_frequencies():
    assert entropy_bits(np.array([[-3, 5], [5, -3]], np.int8)) == pytest.approx(4.0)
    assert entropy_bits(np.repeat(np.arange(256, dtype=np.uint8), 3)) == pytest.approx(256 * 3 * 8)
    assert entropy_bits(np.array([1, 1, 1, 0], np.int8)) == pytest.approx(3 * math.log2(4 / 3) + 2)
    assert entropy_bits(np.zeros(9, np.int8)) == 0.0
    assert entropy_bits(np.zeros(0, np.int8)) == 0.0
