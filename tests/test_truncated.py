"""The randomised decomposition is as good as the exact one, also where singular values hardly fall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgecompress.factorize import truncated as module
from edgecompress.factorize.svd import plain_svd
from edgecompress.factorize.truncated import truncated_svd

Array = NDArray[Any]

SPECTRA = {
    "noise": None,
    "fourth root": lambda place: place**-0.25,
    "root": lambda place: place**-0.5,
    "inverse": lambda place: 1.0 / place,
    "line": lambda place: 1.0 - place / (len(place) + 1.0),
}


@pytest.fixture(autouse=True)
def _small_matrices_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_SIDE", 100)


def matrix_of(spectrum: str, shape: tuple[int, int]) -> Array:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(shape)
    function = SPECTRA[spectrum]
    if function is None:
        return noise
    left, _, right = np.linalg.svd(noise, full_matrices=False)
    return np.asarray((left * function(np.arange(1.0, min(shape) + 1.0))) @ right)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_error_is_within_a_thousandth_of_the_least(spectrum: str, shape: tuple[int, int]) -> None:
    matrix = matrix_of(spectrum, shape)
    exact = np.linalg.svd(matrix, compute_uv=False)
    for rank in (1, 10, 60):
        left, values, right = truncated_svd(matrix, rank)
        assert (left.shape, values.shape, right.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
        error = np.linalg.norm(matrix - (left * values) @ right)
        assert error <= 1.001 * np.sqrt(np.sum(exact[rank:] ** 2))
        np.testing.assert_allclose(left.T @ left, np.eye(rank), atol=1e-10)
        np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-10)
        assert (np.diff(values) <= 0).all()


def test_it_really_iterates_on_big_matrices_of_low_rank_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    real = np.linalg.svd
    monkeypatch.setattr(
        np.linalg, "svd", lambda matrix, **options: asked.append(matrix.shape) or real(matrix, **options)
    )
    for shape, rank in (((300, 420), 60), ((300, 420), 200), ((90, 420), 10)):
        truncated_svd(np.random.default_rng(0).standard_normal(shape), rank)
    assert asked == [(300, 420), (90, 420)]


def test_a_matrix_of_lower_rank_is_rebuilt_at_any_scale() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 300))
    for scale in (1e-30, 1.0, 1e30):
        left, values, right = truncated_svd(scale * matrix, 20)
        error = np.linalg.norm((left * values) @ right - scale * matrix)
        assert error <= 1e-6 * scale * np.linalg.norm(matrix)  # the basis is found in single precision, 2^-24 = 6e-8
    left, values, right = truncated_svd(np.zeros((200, 300)), 5)
    assert not values.any()
    assert np.isfinite(left).all()
    assert np.isfinite(right).all()


def test_the_same_matrix_gives_the_same_bytes_and_fixed_signs() -> None:
    weight = matrix_of("root", (300, 420)).astype(np.float32)
    one, two = plain_svd(weight, 20), plain_svd(weight.copy(), 20)
    assert one.left.tobytes() == two.left.tobytes()
    assert one.right.tobytes() == two.right.tobytes()
    strongest = one.left[np.argmax(np.abs(one.left), axis=0), np.arange(20)]
    assert (strongest > 0).all()
