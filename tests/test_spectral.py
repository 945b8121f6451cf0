"""The frequency form: the coefficients are the least squares, and the best block is found among all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize.cosines import cosine_weights, dct_basis
from edgecompress.factorize.spectral import best_block, block_errors, spectral
from edgecompress.moments import regularised

if TYPE_CHECKING:
    from edgecompress.factorize.forms import Spectral

Array = NDArray[Any]

SHAPES = st.sampled_from([(5, 7), (4, 2, 3), (3, 2, 2, 2), (2, 2, 1, 2, 2), (1, 1)])


def random_moment(rng: np.random.Generator, size: int, rank: int | None = None) -> Array:
    mixing = rng.standard_normal((size, rank or size)) * np.logspace(0, -2, rank or size)
    return mixing @ mixing.T


def error_of(form: Spectral, weight: Array, moment: Array | None) -> float:
    wrong = (weight - form.to_dense()).reshape(len(weight), -1)
    return float(np.sum((wrong if moment is None else wrong @ regularised(moment)) * wrong))


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**16), calibrated=st.booleans(), data=st.data())
def test_the_coefficients_are_the_least_squares_solution(
    shape: tuple[int, ...], seed: int, calibrated: bool, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    flat = weight.reshape(len(weight), -1)
    ranks = tuple(data.draw(st.integers(1, limit)) for limit in flat.shape)
    moment = random_moment(rng, flat.shape[1]) if calibrated else None
    root = np.eye(flat.shape[1]) if moment is None else np.linalg.cholesky(regularised(moment))
    design = np.kron(dct_basis(ranks[0], flat.shape[0]).T, (dct_basis(ranks[1], flat.shape[1]) @ root).T)
    expected = np.linalg.lstsq(design, (flat @ root).ravel(), rcond=None)[0]
    found = spectral(weight, ranks, moment)
    scale = np.outer(cosine_weights(ranks[0]), cosine_weights(ranks[1])).ravel()
    np.testing.assert_allclose(found.coefficients.ravel(), scale * expected, rtol=1e-7, atol=1e-9)
    assert found.shape == shape


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**16), calibrated=st.booleans())
def test_the_error_of_every_block_is_known_without_solving_it(
    shape: tuple[int, ...], seed: int, calibrated: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    moment = random_moment(rng, weight[0].size) if calibrated else None
    errors = block_errors(weight, moment)
    solved = [
        [error_of(spectral(weight, (p + 1, q + 1), moment), weight, moment) for q in range(errors.shape[1])]
        for p in range(errors.shape[0])
    ]
    np.testing.assert_allclose(errors, solved, rtol=1e-7, atol=1e-9 * max(1.0, errors[0, 0]))


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**16), share=st.floats(0.01, 1.0), calibrated=st.booleans())
def test_no_other_block_within_the_share_is_better(
    shape: tuple[int, ...], seed: int, share: float, calibrated: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    moment = random_moment(rng, weight[0].size) if calibrated else None
    p, q = best_block(weight, share, moment)
    errors = block_errors(weight, moment)
    budget = max(1, int(share * weight.size + 1e-9))
    assert p * q <= budget
    within = np.outer(np.arange(1, errors.shape[0] + 1), np.arange(1, errors.shape[1] + 1)) <= budget
    assert errors[p - 1, q - 1] == errors[within].min()


@pytest.mark.parametrize("calibrated", [False, True])
def test_all_frequencies_are_exact(calibrated: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((6, 4, 3))
    form = spectral(weight, (6, 12), random_moment(rng, 12) if calibrated else None)
    np.testing.assert_allclose(form.to_dense(), weight, atol=1e-9)


def test_a_smooth_weight_needs_few_coefficients() -> None:
    rows, columns = np.meshgrid(np.linspace(0, 1, 40), np.linspace(0, 1, 60), indexing="ij")
    weight = np.exp(-((rows - 0.3) ** 2) - (columns - 0.6) ** 2)
    p, q = best_block(weight, 0.05)
    assert error_of(spectral(weight, (p, q)), weight, None) < 1e-4 * np.sum(weight**2)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_degenerate_moments_and_weights_stay_finite(rank: int) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((5, 9))
    moment = random_moment(rng, 9, rank=rank) if rank else np.zeros((9, 9))
    known, plain = spectral(weight, (3, 4), moment), spectral(weight, (3, 4))
    assert error_of(known, weight, moment) <= error_of(plain, weight, moment) * (1 + 1e-9)
    assert not spectral(np.zeros_like(weight), (3, 4), moment).coefficients.any()
    assert best_block(np.zeros_like(weight), 0.5, moment) == (1, 9)


def test_the_same_input_gives_the_same_bytes_in_the_type_of_the_weight() -> None:
    rng = np.random.default_rng(2)
    weight, moment = rng.standard_normal((6, 10)).astype(np.float32), random_moment(rng, 10)
    one, two = spectral(weight, (3, 5), moment), spectral(weight.copy(), (3, 5), moment)
    assert one.coefficients.dtype == np.float32
    assert one.coefficients.tobytes() == two.coefficients.tobytes()


def test_ranks_and_moments_that_do_not_fit_are_refused() -> None:
    for ranks in ((0, 1), (6, 1), (1, 13)):
        with pytest.raises(ValueError, match="is outside 1"):
            spectral(np.ones((5, 4, 3)), ranks)
    with pytest.raises(ValueError, match="the weight needs"):
        spectral(np.ones((5, 4, 3)), (2, 2), np.eye(11))
