"""Choosing ranks: by share, by energy, by variational Bayes, and from curves of the error."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize import rank as module
from edgecompress.factorize.rank import aligned_ranks, evbmf_rank, max_ranks, rank_for_energy, ranks_for_share, solve
from edgecompress.factorize.sizes import FormName, count_parameters, dense_parameters
from edgecompress.factorize.solve import allowed_ranks

Array = NDArray[Any]
FORMS: tuple[FormName, ...] = get_args(FormName)
SOLVABLE = tuple(form for form in FORMS if form != "svd_bias")  # that one needs a bias besides
KERNEL_FORMS = tuple(form for form in SOLVABLE if form not in ("svd", "spectral"))


def random_moment(rng: np.random.Generator, size: int) -> Array:
    mixing = rng.standard_normal((size, size)) * np.logspace(0, -2, size)
    return mixing @ mixing.T


def planted(rng: np.random.Generator, shape: tuple[int, int], rank: int, noise: float) -> Array:
    left, right = (np.linalg.qr(rng.standard_normal((size, rank)))[0] for size in shape)
    return (left * np.linspace(2.0, 1.0, rank)) @ right.T + noise * rng.standard_normal(shape)


@settings(max_examples=80, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    share=st.floats(0.02, 1.2),
)
def test_ranks_for_a_share_stay_within_it_and_use_it(
    form: FormName, shape: tuple[int, int, int, int], share: float
) -> None:
    ranks, limits = ranks_for_share(form, shape, share), max_ranks(form, shape)
    assert all(1 <= rank <= limit for rank, limit in zip(ranks, limits, strict=True))
    budget = share * dense_parameters(form, shape) + 1e-9
    assert count_parameters(form, shape, ranks) <= budget or set(ranks) == {1}
    for axis in range(len(ranks)):
        larger = (*ranks[:axis], ranks[axis] + 1, *ranks[axis + 1 :])
        too_much = count_parameters(form, shape, larger) > budget
        assert too_much or larger != module.supported(form, shape, larger)


@settings(max_examples=40, deadline=None)
@given(
    form=st.sampled_from(SOLVABLE),
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(1, 3)),
    share=st.floats(0.02, 1.0),
)
def test_every_solver_takes_the_ranks_for_a_share(
    form: FormName, shape: tuple[int, int, int, int], share: float
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape)
    ranks = ranks_for_share(form, shape, share)
    solved = solve(form, weight, ranks)
    assert solved.to_dense().shape == shape
    assert solved.parameters == count_parameters(form, shape, ranks)


def test_one_rank_for_every_mode_is_cut_down_to_what_the_shape_allows() -> None:
    shape = (6, 4, 3, 3)
    assert allowed_ranks("svd", shape, 9) == (6,)
    assert allowed_ranks("svd_bias", (6, 4), 9) == (5,)
    assert allowed_ranks("tucker2", shape, 5) == (5, 4)
    assert allowed_ranks("spectral", shape, 9) == (6, 9)


def test_two_ranks_keep_the_proportion_of_the_channels() -> None:
    out, into = ranks_for_share("tucker2", (256, 64, 3, 3), 0.5)
    assert out / into == pytest.approx(4.0, rel=0.05)


def test_energy_counts_squares_and_takes_the_smallest_rank() -> None:
    values = np.array([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1 of 14
    assert [rank_for_energy(values, share) for share in (0.0, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert rank_for_energy(np.zeros(3), 0.9) == 1
    assert rank_for_energy(np.ones(7), 1.0) == 7


@pytest.mark.parametrize("shape", [(60, 60), (50, 200), (200, 50), (64, 576)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_variational_bayes_finds_a_planted_rank(shape: tuple[int, int], rank: int) -> None:
    rng = np.random.default_rng(rank)
    assert evbmf_rank(planted(rng, shape, rank, 0.2 / np.sqrt(max(shape)))) == rank


@pytest.mark.parametrize("shape", [(60, 60), (50, 200), (64, 576), (10, 13)])
@pytest.mark.parametrize("seed", range(3))
def test_variational_bayes_finds_nothing_in_noise(shape: tuple[int, int], seed: int) -> None:
    assert evbmf_rank(np.random.default_rng(seed).standard_normal(shape)) == 0


def test_components_below_the_noise_are_not_counted() -> None:
    rng = np.random.default_rng(1)
    weak = planted(rng, (80, 120), 6, 0.0)
    # The largest singular value of the noise is about 0.5 (sqrt 80 + sqrt 120) = 9.9; the planted ones are at most 2.
    assert evbmf_rank(weak + 0.5 * rng.standard_normal((80, 120))) == 0
    assert evbmf_rank(100.0 * weak + 0.5 * rng.standard_normal((80, 120))) == 6


def test_variational_bayes_does_not_care_for_scale_or_transposition() -> None:
    matrix = planted(np.random.default_rng(2), (40, 90), 7, 0.03)
    assert evbmf_rank(matrix) == evbmf_rank(matrix.T) == evbmf_rank(1e-6 * matrix) == evbmf_rank(1e6 * matrix) == 7


def test_variational_bayes_bears_matrices_without_noise_and_without_anything() -> None:
    assert evbmf_rank(np.zeros((5, 9))) == 0
    assert evbmf_rank(planted(np.random.default_rng(3), (30, 80), 4, 0.0)) == 4
    assert evbmf_rank(np.ones((1, 1))) == 0
    assert evbmf_rank(np.ones((1, 50))) in (0, 1)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 1.0])
def test_the_threshold_is_the_published_one(ratio: float) -> None:
    # The paper approximates the root by 2.5129 sqrt(ratio): exact at ratio 1, within a few percent elsewhere.
    edge = module._edge(ratio)
    root = 2.5129 * np.sqrt(ratio)
    assert edge == pytest.approx((1 + root) * (1 + ratio / root), rel=1e-4 if ratio == 1.0 else 0.03)
    assert edge > (1 + np.sqrt(ratio)) ** 2  # above the bulk of pure noise (Marchenko and Pastur)


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.5, 1.0])
def test_the_free_energy_is_the_same_kept_or_dropped_at_the_threshold(ratio: float) -> None:
    # This is what defines the threshold; above it, keeping wins.
    edge = module._edge(ratio)
    noise = np.array([1.0])
    below, above = (
        module._free_energy(np.array([edge * scale]), noise, ratio, edge)[0] for scale in (1 - 1e-9, 1 + 1e-9)
    )
    assert below == pytest.approx(above, abs=1e-7)
    dropped = 2 * edge - np.log(2 * edge)
    assert module._free_energy(np.array([2 * edge]), noise, ratio, edge)[0] < dropped - 1e-3


@settings(max_examples=20, deadline=None)
@given(at=st.floats(-3, 3))
def test_the_minimum_of_a_function_with_a_false_valley_is_found(at: float) -> None:
    def function(x: Array) -> Array:
        return np.minimum((x - at) ** 2, 0.5 + (x + at) ** 2)

    assert module._minimise(function, -4.0, 4.0) == pytest.approx(at, abs=1e-6)


def test_either_rank_of_tucker_is_at_most_the_other_times_the_kernel() -> None:
    assert module.supported("tucker2", (64, 2, 3, 3), (20, 1)) == (9, 1)
    assert module.supported("tucker2", (3, 90, 2), (0, 80)) == (1, 2)
    for shape in ((64, 2, 3, 3), (2, 64, 1, 2)):
        for share in (0.05, 0.3, 0.6):
            ranks = ranks_for_share("tucker2", shape, share)
            assert solve("tucker2", np.random.default_rng(0).standard_normal(shape), ranks).ranks == ranks


@settings(max_examples=200, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.integers(1, 5)),
    share=st.floats(0.02, 0.9),
    multiple=st.sampled_from([1, 4, 8, 16]),
)
def test_aligned_ranks_are_multiples_and_only_the_first_one_is_above(
    form: FormName, shape: tuple[int, int, int, int], share: float, multiple: int
) -> None:
    ranks, limits = ranks_for_share(form, shape, share), max_ranks(form, shape)
    found = aligned_ranks(form, shape, ranks, multiple)
    assert found == module.supported(form, shape, found)
    if multiple == 1 or form == "spectral":
        assert found == ranks
    if count_parameters(form, shape, found) >= dense_parameters(form, shape):
        assert found == ranks  # it was no smaller before
    for rank, before, limit in zip(found, ranks, limits, strict=True):
        assert rank <= max(before, multiple)
        assert rank > before - multiple or form == "tucker2"  # there one rank may bound the other
        if found != ranks and form != "tucker2":
            assert rank % multiple == 0 or rank == limit


@pytest.mark.parametrize(
    ("form", "shape", "ranks", "expected"),
    [
        ("svd", (64, 64, 1, 1), (23,), (16,)),
        ("svd", (64, 64, 1, 1), (16,), (16,)),
        ("svd", (64, 64, 1, 1), (3,), (8,)),
        ("svd", (10, 10, 1, 1), (4,), (4,)),  # 8 would be 160 parameters instead of 100
        ("separable", (64, 64, 3, 3), (90,), (88,)),
        ("tucker2", (64, 64, 3, 3), (20, 33), (16, 32)),
        ("tucker2", (64, 12, 3, 3), (20, 12), (16, 12)),  # all of its inputs
        ("spectral", (64, 64, 1, 1), (20, 20), (20, 20)),
    ],
)
def test_ranks_are_rounded_down_to_what_kernels_take_at_once(
    form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert aligned_ranks(form, shape, ranks, 8) == expected
