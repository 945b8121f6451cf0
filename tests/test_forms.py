"""The factorized forms: what they multiply out to, hold and cost, and that their steps are the layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgecompress.factorize.cosines import cosines, dct_basis
from edgecompress.factorize.factors import Grouped, factors, with_factors
from edgecompress.factorize.forms import CP, AffineLowRank, InputLowRank, LowRank, Separable, Spectral, Tucker2
from edgecompress.factorize.sizes import count_macs, count_parameters, dense_parameters, fits

Array = NDArray[Any]
RNG_SEED = 7


def convolve(
    values: Array, weight: Array, strides: Sequence[int], pads: Sequence[int], *, depthwise: bool = False
) -> tuple[Array, int]:
    """Return a convolution by its definition and how often it multiplied: the oracle for the steps of a form."""
    padded = np.pad(values, [(0, 0), *((pad, pad) for pad in pads)])
    kernel = weight.shape[2:]
    sizes = [(full - points) // step + 1 for full, points, step in zip(padded.shape[1:], kernel, strides, strict=True)]
    result = np.zeros((weight.shape[0], *sizes))
    for position in itertools.product(*map(range, sizes)):
        window = tuple(
            slice(at * step, at * step + points) for at, step, points in zip(position, strides, kernel, strict=True)
        )
        patch = padded[(slice(None), *window)]
        result[(slice(None), *position)] = (
            np.sum(weight[:, 0] * patch, axis=tuple(range(1, patch.ndim)))
            if depthwise
            else np.tensordot(weight, patch, patch.ndim)
        )
    return result, weight.size * int(np.prod(sizes))


def random_forms(rng: np.random.Generator, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    outputs, channels, height, width = shape
    return {
        "svd": LowRank(rng.standard_normal((outputs, 3)), rng.standard_normal((3, channels, height, width))),
        "svd_in": InputLowRank(rng.standard_normal((outputs, 3, height, width)), rng.standard_normal((3, channels))),
        "separable": Separable(
            rng.standard_normal((3, channels, height, 1)), rng.standard_normal((outputs, 3, 1, width))
        ),
        "tucker2": Tucker2(
            rng.standard_normal((2, 3, height, width)),
            rng.standard_normal((outputs, 2)),
            rng.standard_normal((3, channels)),
        ),
        "cp": CP(
            rng.standard_normal((3, channels)),
            rng.standard_normal((3, height)),
            rng.standard_normal((3, width)),
            rng.standard_normal((outputs, 3)),
        ),
    }


def test_factors_come_in_order_and_a_form_is_rebuilt_from_them() -> None:
    shape = (4, 3, 2, 5)
    forms = random_forms(np.random.default_rng(RNG_SEED), shape)
    forms["svd_bias"] = AffineLowRank(forms["svd"].left, forms["svd"].right, np.ones(3))
    forms["spectral"] = Spectral(np.ones((2, 7)), shape)
    forms["groups"] = Grouped(tuple(random_forms(np.random.default_rng(seed), shape)["cp"] for seed in range(3)))
    for name, form in forms.items():
        parts = factors(form)
        again = with_factors(form, parts)
        np.testing.assert_array_equal(again.to_dense(), form.to_dense())
        for place in range(len(parts)):  # every form is linear in each of its factors
            tripled = with_factors(form, [3 * part if at == place else part for at, part in enumerate(parts)])
            np.testing.assert_allclose(tripled.to_dense(), 3 * form.to_dense(), rtol=1e-12, err_msg=name)
        with pytest.raises(ValueError, match="the factors have shapes"):
            with_factors(form, (*parts[:-1], parts[-1][1:]))
    assert factors(forms["tucker2"])[1] is forms["tucker2"].core
    assert factors(forms["svd"])[0] is forms["svd"].right
    assert with_factors(forms["svd_bias"], factors(forms["svd_bias"])).bias is forms["svd_bias"].bias


def test_groups_stand_one_below_the_other_and_cost_what_all_of_them_cost() -> None:
    shape = (4, 3, 2, 5)
    for name in ("svd", "svd_in", "separable", "tucker2", "cp"):
        parts = tuple(random_forms(np.random.default_rng(seed), shape)[name] for seed in range(3))
        form = Grouped(parts)
        assert form.to_dense().shape == (12, 3, 2, 5)
        np.testing.assert_array_equal(form.to_dense()[4:8], parts[1].to_dense())
        assert form.parameters == 3 * parts[0].parameters
        assert form.macs((6, 7), (5, 3)) == 3 * parts[0].macs((6, 7), (5, 3))


def test_a_form_with_a_bias_is_worth_its_weight_and_its_bias() -> None:
    rng = np.random.default_rng(RNG_SEED)
    form = AffineLowRank(rng.standard_normal((10, 2)), rng.standard_normal((2, 13)), rng.standard_normal(2))
    x = rng.standard_normal(13)
    np.testing.assert_allclose(form.left @ (form.right @ x + form.bias), form.to_dense() @ x + form.bias_to_dense())
    assert form.parameters == 48 == count_parameters("svd_bias", (10, 13), (2,))
    assert dense_parameters("svd_bias", (10, 13)) == 140
    assert form.macs((), ()) == 46


def run_steps(form: Any, values: Array, strides: tuple[int, int], pads: tuple[int, int]) -> tuple[Array, int]:
    """Run a form step by step, as a graph would."""
    (down, across), (top, side) = strides, pads
    whole, point = (strides, pads), ((1, 1), (0, 0))
    steps: list[tuple[Array, tuple[tuple[int, int], tuple[int, int]], bool]]
    if isinstance(form, LowRank):
        steps = [(form.right, whole, False), (form.left[:, :, None, None], point, False)]
    elif isinstance(form, InputLowRank):
        steps = [(form.right[:, :, None, None], point, False), (form.left, whole, False)]
    elif isinstance(form, Separable):
        steps = [
            (form.vertical, ((down, 1), (top, 0)), False),
            (form.horizontal, ((1, across), (0, side)), False),
        ]
    elif isinstance(form, Tucker2):
        steps = [
            (form.in_factor[:, :, None, None], point, False),
            (form.core, whole, False),
            (form.out_factor[:, :, None, None], point, False),
        ]
    else:
        steps = [
            (form.in_factor[:, :, None, None], point, False),
            (form.vertical[:, None, :, None], ((down, 1), (top, 0)), True),
            (form.horizontal[:, None, None, :], ((1, across), (0, side)), True),
            (form.out_factor[:, :, None, None], point, False),
        ]
    work = 0
    for weight, (step_strides, step_pads), depthwise in steps:
        values, macs = convolve(values, weight, step_strides, step_pads, depthwise=depthwise)
        work += macs
    return values, work


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["svd", "svd_in", "separable", "tucker2", "cp"]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_the_steps_of_every_form_compute_its_dense_weight_at_the_stated_cost(
    name: str, shape: tuple[int, int, int, int], strides: tuple[int, int], pads: tuple[int, int]
) -> None:
    rng = np.random.default_rng(RNG_SEED)
    form = random_forms(rng, shape)[name]
    image = rng.standard_normal((shape[1], 6, 7))
    expected, _ = convolve(image, form.to_dense(), strides, pads)
    stepwise, work = run_steps(form, image, strides, pads)
    np.testing.assert_allclose(stepwise, expected, rtol=1e-10, atol=1e-10)
    assert form.macs((6, 7), expected.shape[1:]) == work


def test_each_form_multiplies_out_entry_by_entry() -> None:
    rng = np.random.default_rng(RNG_SEED)
    forms = random_forms(rng, (4, 3, 2, 5))
    o, i, a, b = 2, 1, 1, 4
    low, first, separable, tucker, cp = (forms[name] for name in ("svd", "svd_in", "separable", "tucker2", "cp"))
    assert low.to_dense()[o, i, a, b] == pytest.approx(sum(low.left[o, r] * low.right[r, i, a, b] for r in range(3)))
    assert first.to_dense()[o, i, a, b] == pytest.approx(
        sum(first.left[o, r, a, b] * first.right[r, i] for r in range(3))
    )
    assert separable.to_dense()[o, i, a, b] == pytest.approx(
        sum(separable.horizontal[o, r, 0, b] * separable.vertical[r, i, a, 0] for r in range(3))
    )
    assert tucker.to_dense()[o, i, a, b] == pytest.approx(
        sum(
            tucker.out_factor[o, s] * tucker.core[s, t, a, b] * tucker.in_factor[t, i]
            for s in range(2)
            for t in range(3)
        )
    )
    assert cp.to_dense()[o, i, a, b] == pytest.approx(
        sum(cp.out_factor[o, r] * cp.vertical[r, a] * cp.horizontal[r, b] * cp.in_factor[r, i] for r in range(3))
    )


def test_parameters_counted_without_the_form_are_those_of_the_form() -> None:
    shape = (6, 5, 3, 2)
    for name, form in random_forms(np.random.default_rng(RNG_SEED), shape).items():
        ranks = form.ranks if hasattr(form, "ranks") else (form.rank,)
        stored = sum(value.size for value in vars(form).values())
        assert form.parameters == stored == count_parameters(name, shape, ranks)
    spectral = Spectral(np.ones((2, 7)), shape)
    assert spectral.parameters == 14 == count_parameters("spectral", shape, spectral.ranks)


def test_tucker_parameters_are_the_published_formula() -> None:
    size, inputs, outputs, rank_in, rank_out = 3, 64, 128, 20, 30
    expected = inputs * rank_in + size**2 * rank_in * rank_out + outputs * rank_out
    assert count_parameters("tucker2", (outputs, inputs, size, size), (rank_out, rank_in)) == expected


@pytest.mark.parametrize("kernel", [(5,), (2, 3, 4)])
def test_forms_for_any_kernel_multiply_out_in_one_and_three_dimensions(kernel: tuple[int, ...]) -> None:
    rng = np.random.default_rng(RNG_SEED)
    core, left, right = rng.standard_normal((2, 3, *kernel)), rng.standard_normal((4, 2)), rng.standard_normal((3, 5))
    dense = Tucker2(core, left, right).to_dense()
    assert dense.shape == (4, 5, *kernel)
    np.testing.assert_allclose(dense[1, 2], np.tensordot(np.outer(left[1], right[:, 2]), core, 2), rtol=1e-12)
    first = InputLowRank(rng.standard_normal((4, 3, *kernel)), right)
    np.testing.assert_allclose(first.to_dense()[1, 2], np.tensordot(right[:, 2], first.left[1], 1), rtol=1e-12)
    whole = np.random.default_rng(1).standard_normal((4, 3))
    np.testing.assert_allclose(
        Spectral(whole, (4, 5, *kernel)).to_dense().reshape(4, -1),
        2 / np.sqrt(20 * np.prod(kernel)) * cosines(4, 4).T @ whole @ cosines(3, 5 * int(np.prod(kernel))),
    )


def test_a_matrix_layer_costs_its_parameters_per_remaining_position() -> None:
    assert count_macs("svd", (8, 6), (2,), inputs=(), outputs=()) == 2 * (8 + 6)
    assert count_macs("svd", (8, 6), (2,), inputs=(5,), outputs=(5,)) == 5 * 2 * (8 + 6)


def test_the_frequency_form_saves_storage_and_no_work() -> None:
    form = Spectral(np.zeros((2, 3), np.float32), (8, 6))
    assert form.parameters == 6
    assert form.macs((), ()) == 8 * 6


@pytest.mark.parametrize("length", [1, 2, 7, 784])
def test_the_cosine_basis_is_orthonormal(length: int) -> None:
    basis = dct_basis(length, length)
    np.testing.assert_allclose(basis @ basis.T, np.eye(length), atol=1e-12)
    assert (basis[0] > 0).all()


def test_the_cosine_basis_is_exact_where_the_phase_is_large() -> None:
    # One product (2 i + 1) k is about 7e6 turns of the circle; without the reduction modulo 4 N it costs seven digits.
    length = 3001
    basis = dct_basis(length, length)
    k, i = length - 1, length - 2
    turn = np.longdouble((2 * i + 1) * k % (4 * length)) / (4 * length)
    expected = np.sqrt(np.longdouble(2) / length) * np.cos(8 * np.arctan(np.longdouble(1)) * turn)
    assert basis[k, i] == pytest.approx(float(expected), abs=1e-17)


def test_forms_are_offered_only_where_they_differ_from_simpler_ones() -> None:
    assert fits("separable", (4, 4, 3, 3))
    assert not fits("separable", (4, 4, 1, 3))
    assert not fits("cp", (4, 4, 3))
    assert fits("tucker2", (4, 4, 3))
    assert not fits("tucker2", (4, 4, 1, 1))
    assert not fits("svd_in", (4, 4))
    assert fits("svd", (4, 4))
    assert fits("spectral", (4, 4, 3, 3, 3))
