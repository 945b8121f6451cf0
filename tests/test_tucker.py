"""Tucker-2 and the channels-first form: never worse than plain, right at the limits where the answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize import tucker as module
from edgecompress.factorize.forms import Tucker2
from edgecompress.factorize.tucker import input_low_rank, tucker2
from edgecompress.moments import regularised

Array = NDArray[Any]

KERNELS = st.sampled_from([(3,), (2, 3), (3, 3), (2, 2, 2)])


def random_moment(rng: np.random.Generator, size: int, rank: int | None = None) -> Array:
    mixing = rng.standard_normal((size, rank or size)) * np.logspace(0, -2, rank or size)
    return mixing @ mixing.T


def error_of(form: Any, weight: Array, moment: Array) -> float:
    wrong = (weight - form.to_dense()).reshape(len(weight), -1)
    return float(np.sum((wrong @ regularised(moment)) * wrong))


def energy_of(weight: Array, moment: Array) -> float:
    flat = weight.reshape(len(weight), -1)
    return float(np.sum((flat @ regularised(moment)) * flat))


@settings(max_examples=15, deadline=None)
@given(kernel=KERNELS, seed=st.integers(0, 2**16), ranks=st.tuples(st.integers(1, 5), st.integers(1, 4)))
def test_calibrated_forms_are_never_worse_than_plain_ones(
    kernel: tuple[int, ...], seed: int, ranks: tuple[int, int]
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, 4, *kernel))
    ranks = (min(ranks[0], ranks[1] * 3), min(ranks[1], ranks[0] * 3))
    moment = random_moment(rng, weight[0].size)
    slack = 1e-9 * energy_of(weight, moment)
    for solver, rank in ((tucker2, ranks), (input_low_rank, ranks[1])):
        calibrated, plain = (error_of(solver(weight, rank, known), weight, moment) for known in (moment, None))
        assert calibrated <= plain * (1 + 1e-9) + slack


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_round_lowers_the_error(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, moment = rng.standard_normal((6, 5, 3, 3)), random_moment(rng, 45)
    for solver, rank in ((tucker2, (4, 3)), (input_low_rank, 3)):
        errors = [error_of(solver(weight, rank, moment, rounds=rounds), weight, moment) for rounds in range(6)]
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
        assert errors[-1] < errors[0]


def test_a_round_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    weight, moment = rng.standard_normal((6, 5, 3, 3)), random_moment(rng, 45)
    start = tucker2(weight, (4, 3), moment, rounds=0)
    monkeypatch.setattr(module, "solve_first", lambda _, first, __: rng.standard_normal(first.shape))
    assert tucker2(weight, (4, 3), moment).in_factor.tobytes() == start.in_factor.tobytes()


def test_calibration_gains_where_the_inputs_are_correlated() -> None:
    rng = np.random.default_rng(0)
    weight, moment = rng.standard_normal((8, 6, 3, 3)), random_moment(rng, 54, rank=8)
    for solver, rank in ((tucker2, (4, 4)), (input_low_rank, 4)):
        calibrated, plain = (error_of(solver(weight, rank, known), weight, moment) for known in (moment, None))
        assert calibrated < 0.7 * plain


def test_with_all_input_channels_tucker_is_the_calibrated_svd() -> None:
    rng = np.random.default_rng(1)
    weight, moment = rng.standard_normal((6, 4, 3, 2)), random_moment(rng, 24)
    flat = weight.reshape(6, -1)
    values = np.linalg.eigvalsh(flat @ regularised(moment) @ flat.T)
    for rank in (1, 3, 5):
        form = tucker2(weight, (rank, 4), moment)
        assert error_of(form, weight, moment) == pytest.approx(np.sum(values[: 6 - rank]), rel=1e-6)


def test_with_all_outputs_tucker_is_the_channels_first_form() -> None:
    rng = np.random.default_rng(2)
    weight, moment = rng.standard_normal((4, 6, 3, 3)), random_moment(rng, 54)
    tucker, first = tucker2(weight, (4, 3), moment), input_low_rank(weight, 3, moment)
    # Both alternate from starts of their own; they may stop within a few tolerances of each other.
    assert error_of(tucker, weight, moment) == pytest.approx(error_of(first, weight, moment), rel=0.05)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kernel", [(3,), (3, 2), (2, 2, 3)])
def test_full_ranks_are_exact(kernel: tuple[int, ...], calibrated: bool) -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((5, 3, *kernel))
    moment = random_moment(rng, weight[0].size) if calibrated else None
    np.testing.assert_allclose(tucker2(weight, (5, 3), moment).to_dense(), weight, atol=1e-6)
    np.testing.assert_allclose(input_low_rank(weight, 3, moment).to_dense(), weight, atol=1e-6)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_tucker_weight_is_found_at_its_own_ranks(calibrated: bool) -> None:
    rng = np.random.default_rng(4)
    core, left, right = rng.standard_normal((3, 2, 3, 3)), rng.standard_normal((7, 3)), rng.standard_normal((2, 6))
    weight = Tucker2(core, left, right).to_dense()
    moment = random_moment(rng, 54) if calibrated else None
    np.testing.assert_allclose(tucker2(weight, (3, 2), moment).to_dense(), weight, atol=1e-5)
    np.testing.assert_allclose(input_low_rank(weight, 2, moment).to_dense(), weight, atol=1e-5)


def test_without_a_moment_the_channels_first_form_is_a_truncated_svd() -> None:
    weight = np.random.default_rng(5).standard_normal((6, 5, 3, 3))
    values = np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(5, -1), compute_uv=False)
    wrong = weight - input_low_rank(weight, 2).to_dense()
    assert np.sum(wrong**2) == pytest.approx(np.sum(values[2:] ** 2), rel=1e-10)


def test_without_a_moment_tucker_is_at_least_as_good_as_truncated_unfoldings() -> None:
    weight = np.random.default_rng(6).standard_normal((6, 5, 3, 3))
    left = np.linalg.svd(weight.reshape(6, -1))[0][:, :3]
    right = np.linalg.svd(weight.transpose(1, 0, 2, 3).reshape(5, -1))[0][:, :2]
    once = np.einsum("ij,jkab,kl->ilab", left @ left.T, weight, right @ right.T)
    assert np.sum((weight - tucker2(weight, (3, 2)).to_dense()) ** 2) <= np.sum((weight - once) ** 2) * (1 + 1e-12)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_moments_and_weights_stay_finite(rank: int) -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((5, 4, 3, 3))
    moment = random_moment(rng, 36, rank=rank) if rank else np.zeros((36, 36))
    for solver, ranks in ((tucker2, (3, 2)), (input_low_rank, 2)):
        form = solver(weight, ranks, moment)
        assert np.isfinite(form.to_dense()).all()
        assert error_of(form, weight, moment) <= error_of(solver(weight, ranks), weight, moment) * (1 + 1e-9)
        assert not solver(np.zeros_like(weight), ranks, moment).to_dense().any()
        assert not solver(np.zeros_like(weight), ranks).to_dense().any()


def test_the_same_input_gives_the_same_bytes_in_the_type_of_the_weight() -> None:
    rng = np.random.default_rng(8)
    weight, moment = rng.standard_normal((6, 5, 3, 3)).astype(np.float32), random_moment(rng, 45)
    for known in (None, moment):
        one, two = tucker2(weight, (4, 3), known), tucker2(weight.copy(), (4, 3), known)
        assert (one.core.shape, one.out_factor.shape, one.in_factor.shape) == ((4, 3, 3, 3), (6, 4), (3, 5))
        for part, again in zip(vars(one).values(), vars(two).values(), strict=True):
            assert part.dtype == np.float32
            assert part.tobytes() == again.tobytes()
    first = input_low_rank(weight, 3, moment)
    assert (first.left.shape, first.right.shape, first.left.dtype) == ((6, 3, 3, 3), (3, 5), np.float32)


def test_ranks_and_shapes_that_do_not_fit_are_refused() -> None:
    weight = np.ones((5, 4, 3))
    for ranks in ((0, 1), (6, 4), (5, 5), (4, 1), (1, 4)):
        with pytest.raises(ValueError, match="is outside 1"):
            tucker2(weight, ranks)
    with pytest.raises(ValueError, match="is outside 1"):
        input_low_rank(weight, 5)
    with pytest.raises(ValueError, match="needs a weight with a kernel"):
        tucker2(np.ones((5, 4)), (2, 2))
    with pytest.raises(ValueError, match="the weight needs"):
        tucker2(weight, (2, 2), np.eye(11))
