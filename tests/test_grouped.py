"""Grouped convolutions: every group is solved by itself, under its own moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgecompress.factorize.factors import Grouped
from edgecompress.factorize.rank import solve
from edgecompress.factorize.solve import best_form, ranks_by_value, solve_layer
from edgecompress.moments import Moments

if TYPE_CHECKING:
    from edgecompress.factorize.sizes import FormName

Array = NDArray[Any]
GROUPS = 3


def case(full: bool = True) -> tuple[Array, Moments]:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4 * GROUPS, 3, 2, 2))
    mixing = rng.standard_normal((GROUPS, 12, 12)) * np.logspace(0, -2, 12)
    second = mixing @ mixing.transpose(0, 2, 1)
    return weight, Moments("w", second if full else np.diagonal(second, axis1=1, axis2=2).copy(), 9)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(
    ("form", "ranks"), [("svd", (2,)), ("svd_in", (2,)), ("separable", (3,)), ("tucker2", (2, 2)), ("cp", (3,))]
)
def test_every_group_is_solved_under_its_own_moment(form: FormName, ranks: tuple[int, ...], full: bool) -> None:
    weight, moments = case(full)
    found = solve_layer(form, weight, ranks, moments, groups=GROUPS)
    assert isinstance(found, Grouped)
    for group, part in enumerate(found.parts):
        own = Moments("w", moments.second_moment[group : group + 1], 9)
        alone = solve_layer(form, weight[4 * group : 4 * group + 4], ranks, own)
        np.testing.assert_array_equal(part.to_dense(), alone.to_dense())
    plain = solve_layer(form, weight, ranks, None, groups=GROUPS)
    np.testing.assert_array_equal(plain.to_dense()[4:8], solve(form, weight[4:8], ranks).to_dense())


@pytest.mark.parametrize(("form", "ranks"), [("spectral", (2, 2)), ("svd_bias", (2,))])
def test_forms_that_groups_cannot_have_are_refused(form: FormName, ranks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=form):
        solve_layer(form, case()[0], ranks, None, groups=GROUPS, bias=np.ones(12))


def test_the_best_form_keeps_its_share_of_all_groups() -> None:
    weight, moments = case()
    for known in (moments, None):
        chosen = best_form(weight, 0.6, known, groups=GROUPS)
        assert chosen is not None
        assert solve_layer(*chosen[:1], weight, chosen[1], known, groups=GROUPS).parameters <= 0.6 * weight.size
    assert best_form(weight[:, :1, :1, :1], 0.6, None, groups=GROUPS) is None


def test_the_rank_for_an_energy_counts_all_groups_together() -> None:
    weight = np.zeros((4, 2, 1))
    weight[0, 0], weight[1, 1] = 3.0, 1.0  # singular values 3 and 1 of the first group
    weight[2, 0], weight[3, 1] = 2.0, 2.0  # 2 and 2 of the second: at rank 1, 13 of 18 are held
    found = [ranks_by_value("svd", weight, energy=share, groups=2) for share in (0.7, 13 / 18, 0.75, 1.0)]
    assert found == [(1,), (1,), (2,), (2,)]
    rng = np.random.default_rng(1)
    planted = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 60))
    both = np.concatenate([planted, np.zeros((40, 60))]) + 0.05 * rng.standard_normal((80, 60))
    assert ranks_by_value("svd", both, energy=None, groups=2) == (3,)


def test_variational_bayes_finds_both_ranks_of_a_tucker_form() -> None:
    rng = np.random.default_rng(5)
    core, left, right = (rng.standard_normal(shape) for shape in ((6, 4, 3, 3), (40, 6), (32, 4)))
    planted = np.einsum("stab,os,it->oiab", core, left, right)
    noisy = planted + 0.05 * rng.standard_normal(planted.shape)
    assert ranks_by_value("tucker2", noisy, energy=None) == (6, 4)
    assert ranks_by_value("tucker2", rng.standard_normal(planted.shape), energy=None) is None
    assert ranks_by_value("tucker2", planted, energy=1.0 - 1e-9) == (6, 4)
