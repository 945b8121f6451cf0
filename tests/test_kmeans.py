from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgecompress.cluster import kmeans as module
from edgecompress.cluster.kmeans import kmeans

SHAPES = st.integers(1, 400)
VALUES = SHAPES.flatmap(lambda size: arrays(np.float32, size, elements=st.floats(-1e3, 1e3, width=32)))


def distortion(values, form, mass=None):
    error = (values.astype(np.float64) - form.to_dense().astype(np.float64)) ** 2
    return float(np.sum(error if mass is None else error * mass))


def optimum(values, clusters, mass=None):
    """The least distortion of all partitions into intervals, from every last interval of every prefix."""
    order = np.argsort(values)
    values = values[order].astype(np.float64)
    mass = np.ones(values.size) if mass is None else mass[order].astype(np.float64)
    size = values.size
    cost = np.zeros((size + 1, size + 1))
    for start, stop in itertools.combinations(range(size + 1), 2):
        part, weight = values[start:stop], mass[start:stop]
        mean = np.sum(part * weight) / np.sum(weight)
        cost[start, stop] = np.sum(weight * (part - mean) ** 2)
    best = cost[0]
    for _ in range(clusters - 1):
        best = np.array([0.0, *(min(best[:stop] + cost[:stop, stop]) for stop in range(1, size + 1))])
    return float(best[-1])


@settings(max_examples=60, deadline=None)
@given(VALUES, st.integers(1, 40))
def test_every_value_has_its_nearest_centroid(values, clusters):
    form = kmeans(values, clusters)
    away = np.abs(values.astype(np.float64)[:, None] - form.codebook.astype(np.float64))
    assert (away[np.arange(len(values)), form.indices] == away.min(axis=1)).all()
    assert form.codebook.size <= clusters
    assert (np.diff(form.codebook) > 0).all()
    assert set(form.indices) == set(range(form.codebook.size))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_few_hundred_values_get_the_best_of_all_partitions(size, clusters, weighted, seed):
    rng = np.random.default_rng(seed)
    values, mass = rng.standard_t(2, size=size), rng.random(size) + 0.05
    mass = mass if weighted else None
    # mass and sums of the sketch are rounded: partitions this close to the best cannot be told from it
    rounding = 1e-6 * np.sum(values**2)
    found = distortion(values, kmeans(values, clusters, mass), mass)
    assert abs(found - optimum(values, clusters, mass)) <= rounding


@pytest.mark.parametrize("clusters", [3, 16, 100])
@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "lognormal", "two lumps"])
def test_more_values_than_the_sketch_has_cells_come_within_two_percent_of_the_best(draw, clusters, monkeypatch):
    rng = np.random.default_rng(0)
    lumps = np.concatenate((rng.normal(size=2500), rng.normal(size=2500) / 50 + 90))
    values = lumps if draw == "two lumps" else getattr(rng, draw)(size=5000)
    found = distortion(values, kmeans(values, clusters))
    monkeypatch.setattr(module, "_CELLS", values.size)  # every value a cell of its own: the best of all
    assert found <= 1.02 * distortion(values, kmeans(values, clusters))


def test_outliers_leave_no_cluster_empty():
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32)
    values[::5000] *= 1e4
    form = kmeans(values, 32)
    assert form.codebook.size == 32
    assert np.count_nonzero(np.abs(form.codebook) < 5) >= 28


def test_values_that_do_not_count_still_have_their_nearest_centroid():
    values, mass = np.arange(3000.0), np.zeros(3000)
    mass[1000:1004] = 1.0
    form = kmeans(values, 4, mass)
    assert form.codebook.tolist() == [1000, 1001, 1002, 1003]
    assert (form.indices[:1000] == 0).all()
    assert (form.indices[1004:] == 3).all()


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, st.integers(2, 300), elements=st.floats(-10, 10)), st.integers(2, 12), st.booleans())
def test_each_centroid_is_the_mean_of_its_members(values, clusters, weighted):
    mass = np.random.default_rng(values.size).random(values.shape) if weighted else np.ones(values.shape)
    form = kmeans(values, clusters, mass if weighted else None)
    if np.unique(values).size <= clusters:
        assert np.array_equal(form.to_dense(), values)
        return
    for index, centroid in enumerate(form.codebook):
        members = form.indices == index
        # the mass is float32 inside
        assert centroid == pytest.approx(np.average(values[members], weights=mass[members]), rel=1e-5, abs=1e-5)


def test_a_heavy_value_pulls_the_centroid_to_itself():
    values = np.array([0.0, 1.0, 10.0, 11.0], np.float32)
    form = kmeans(values, 2, np.array([9.0, 1.0, 1.0, 3.0]))
    np.testing.assert_allclose(form.codebook, [0.1, 10.75], rtol=1e-6)


def test_importance_broadcasts_over_the_shape_of_the_weight():
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    columns = np.arange(1.0, 9.0)[None]
    whole = np.broadcast_to(columns, values.shape).copy()
    first, second = kmeans(values, 4, columns), kmeans(values, 4, whole)
    assert np.array_equal(first.codebook, second.codebook)
    assert np.array_equal(first.indices, second.indices)


def test_importance_of_zero_everywhere_is_no_importance():
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    assert np.array_equal(kmeans(values, 4, np.zeros(50)).codebook, kmeans(values, 4).codebook)


def test_the_scale_of_importance_does_not_matter():
    values, mass = np.random.default_rng(0).normal(size=50), np.random.default_rng(1).random(50)
    for scale in (1e-80, 1e80):
        np.testing.assert_allclose(
            kmeans(values, 4, mass * scale).codebook, kmeans(values, 4, mass).codebook, rtol=1e-6
        )


def test_more_rounds_never_raise_the_distortion(monkeypatch):
    values = np.random.default_rng(3).standard_t(3, size=40_000)
    monkeypatch.setattr(module, "_CELLS", 16)  # a coarse sketch: there is something left to gain
    found = []
    for rounds in range(1, 40):
        monkeypatch.setattr(module, "_MAX_ROUNDS", rounds)
        found.append(distortion(values, kmeans(values, 16)))
    assert all(later <= sooner * (1 + 1e-12) for sooner, later in itertools.pairwise(found))
    assert found[-1] < 0.999 * found[0]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_result_scales_with_the_values(scale):
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    form, scaled = kmeans(values, 8), kmeans((values * np.float32(scale)).astype(np.float32), 8)
    np.testing.assert_allclose(scaled.codebook, form.codebook * scale, rtol=1e-4)


def test_small_values_keep_their_mean_beside_huge_ones():
    small = np.array([1.0, 1.25, 1.5, 2.0])
    values = np.concatenate([[-1e30], np.repeat(small, 100), [1e30]])
    form = kmeans(values, 3)
    np.testing.assert_allclose(form.codebook, [-1e30, small.mean(), 1e30], rtol=1e-12)


def test_values_smaller_than_a_block_and_larger_give_the_same_as_plain_means():
    values = np.sort(np.random.default_rng(1).normal(size=100_003).astype(np.float32))
    form = kmeans(values, 3)
    for index, centroid in enumerate(form.codebook):
        assert centroid == pytest.approx(values[form.indices == index].mean(dtype=np.float64), rel=1e-6)


def test_float16_stays_float16_and_a_boundary_that_cannot_be_written_goes_down():
    values = np.array([1.0, 1.001, 3.0, 60000.0], np.float16)
    form = kmeans(values, 256)
    assert form.codebook.dtype == np.float16
    assert np.array_equal(form.to_dense(), values)
    # the middle of these two neighbours is no float16: each value must stay with itself
    pair = np.array([1.0, np.nextafter(np.float16(1), np.float16(2))], np.float16)
    assert np.array_equal(kmeans(pair, 2).to_dense(), pair)


def test_one_cluster_is_the_mean():
    values = np.array([1, 2, 6], np.float32)
    form = kmeans(values, 1)
    assert form.codebook.tolist() == [3.0]
    assert form.indices.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)])
def test_one_distinct_value_is_one_cluster_whatever_the_shape(shape):
    form = kmeans(np.full(shape, 0.5, np.float32), 32)
    assert form.codebook.tolist() == [0.5]
    assert form.indices.shape == shape
    assert form.indices.dtype == np.uint8


def test_no_more_distinct_values_than_clusters_are_kept_exactly():
    values = np.random.default_rng(0).choice(np.array([-7, 0.1, 0.1001, 0.2, 1e4], np.float32), size=(20, 5))
    assert np.array_equal(kmeans(values, 5).to_dense(), values)
    assert kmeans(values, 4).codebook.size <= 4


def test_256_clusters_fit_the_indices():
    values = np.linspace(-1, 1, 5000, dtype=np.float32)
    form = kmeans(values, 256)
    assert form.codebook.size == 256
    assert form.indices.max() == 255


def test_a_view_that_is_not_contiguous_gives_what_its_copy_gives():
    values = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    assert np.array_equal(kmeans(values.T, 8).indices, kmeans(values, 8).indices.T)


def test_twice_gives_the_same_bytes():
    values, mass = np.random.default_rng(0).normal(size=(2, 10_000)).astype(np.float32)
    first, second = (kmeans(values, 32, np.abs(mass)) for _ in range(2))
    assert first.codebook.tobytes() == second.codebook.tobytes()
    assert first.indices.tobytes() == second.indices.tobytes()


@pytest.mark.parametrize("clusters", [0, 257, -1])
def test_a_number_of_clusters_outside_the_range_is_refused(clusters):
    with pytest.raises(ValueError, match=r"1 \.\. 256"):
        kmeans(np.ones(4, np.float32), clusters)


def test_nothing_to_cluster_is_refused():
    with pytest.raises(ValueError, match="no values"):
        kmeans(np.ones((0, 3), np.float32), 4)
