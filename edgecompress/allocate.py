"""Share one budget of parameters or multiply-accumulates over the layers, so that the model's output changes least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edgecompress.errors import BudgetError, RecipeError
from edgecompress.factorize.curves import Curve, error_curve
from edgecompress.factorize.rank import ranks_for_share
from edgecompress.factorize.sizes import FormName, count_macs, count_parameters, dense_parameters
from edgecompress.orientation import group_shape, read_weight, stored
from edgecompress.sensitivity import Probe

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.graph import Graph
    from edgecompress.layers import Layer
    from edgecompress.model import Array, Model
    from edgecompress.moments import Moments

    Ranks = tuple[int, ...]
    Allocation = Mapping[str, tuple[FormName, Ranks] | None]

Unit = Literal["parameters", "macs"]
Progress = Callable[[int, int], None]

STEPS = 20_000
"""The knapsack counts in at most this many units of what the budget has above its least; a cost is rounded up."""

GRID = 64
"""A layer's candidates are the ranks at multiples of 1 / 64 of its parameters."""

_MEASURED = (0.0, 0.06, 0.3, 0.75)
_ANCHORS = (*_MEASURED, 0.15, 0.5)
"""Where on the grid a form is solved, and at which of these the model is run: on ResNet-20 ten places gave no better
allocation than these, while extrapolating down to the lowest ranks from higher ones ruined it."""

_SMALLEST_DIVERGENCE = 1e-9
_LARGEST_ERROR = 1e30


@dataclass(frozen=True)
class Candidate:
    """What a layer may become: a form at some ranks, or for ``form`` None itself.

    ``cost`` is in the budget's unit, ``error`` what the choice does to the model's output, 0 where nothing.
    """

    form: FormName | None
    ranks: tuple[int, ...]
    cost: int
    error: float


def allocate(candidates: Sequence[Sequence[Candidate]], budget: int) -> list[int]:
    """Return which candidate of every layer to take, so that the costs fit ``budget`` and the errors' sum is least.

    A multiple-choice knapsack (Kellerer et al. 2004, chapter 11) by dynamic programming over costs. Exact where what
    the budget leaves above the cheapest choice is at most ``STEPS`` times the greatest common divisor of the layers'
    cost differences; else a layer may count up to 1 / ``STEPS`` of that more than it costs. The same input gives the
    same choice.

    Raises:
        BudgetError: even the cheapest candidates cost more.
    """
    cheapest = [min(each.cost for each in choices) for choices in candidates]
    room = budget - sum(cheapest)
    if room < 0:
        raise BudgetError(
            f"the budget of {budget} is out of reach: the least that the layers can have is {sum(cheapest)}",
            hint="raise --keep, or let fewer layers share the budget",
        )
    extra = [[each.cost - least for each in choices] for choices, least in zip(candidates, cheapest, strict=True)]
    divisor = math.gcd(*(cost for costs in extra for cost in costs)) or 1
    unit = divisor * max(1, math.ceil(room / (divisor * STEPS)))
    steps = [[-(-cost // unit) for cost in costs] for costs in extra]
    best = np.zeros(room // unit + 1)  # of the layers so far, by the units that they may take together
    taken: list[Array] = []
    for choices, costs in zip(candidates, steps, strict=True):
        best, choice = _add_layer(best, choices, costs)
        taken.append(choice)
    left, chosen = len(best) - 1, []
    for choice, costs in zip(reversed(taken), reversed(steps), strict=True):
        chosen.append(int(choice[left]))
        left -= costs[chosen[-1]]
    return chosen[::-1]


def _add_layer(best: Array, choices: Sequence[Candidate], costs: Sequence[int]) -> tuple[Array, Array]:
    """Return the least error at every size of the knapsack with one more layer, and which candidate gives it."""
    total, choice = np.full(len(best), np.inf), np.zeros(len(best), np.int32)
    for index in _worthwhile(choices):
        cost = costs[index]
        if cost >= len(best):
            continue
        found = best[: len(best) - cost] + min(choices[index].error, _LARGEST_ERROR)
        better = found < total[cost:]
        total[cost:][better] = found[better]
        choice[cost:][better] = index
    return total, choice


def _worthwhile(choices: Sequence[Candidate]) -> list[int]:
    """Return the candidates that are better than all cheaper ones, the cheapest first."""
    rising = sorted(range(len(choices)), key=lambda index: (choices[index].cost, choices[index].error))
    kept: list[int] = []
    for index in rising:
        if not kept or choices[index].error < choices[kept[-1]].error:
            kept.append(index)
    return kept


def allocate_ranks(
    model: Model,
    graph: Graph,
    layers: Sequence[Layer],
    forms: Mapping[str, Sequence[FormName]],
    *,
    moments: Mapping[str, Moments],
    data: DataSet | None,
    keep: float,
    unit: Unit,
    progress: Progress | None = None,
) -> Allocation:
    """Return what every layer in ``forms`` becomes when together they keep the share ``keep`` of their ``unit``.

    ``forms`` names the forms that a layer may take; ``None`` in the result leaves the layer as it is. The error of a
    form is how much the model's output diverges when only this layer is replaced, measured on ``data`` at a few ranks
    and interpolated over the layer's own output error; without data it is the layer's relative error. ``progress``
    counts layers.

    Raises:
        BudgetError: the share is smaller than the smallest forms.
        RecipeError: the budget is in MACs, and those of a layer are unknown.
        ModelError, DataError: the model does not run on ``data``; a weight holds NaN or Inf.
    """
    sharing = [layer for layer in layers if layer.name in forms]
    costs = [_cost(layer, unit) for layer in sharing]
    macs = sum(layer.macs or 0 for layer in layers)
    probe = Probe(model, data, macs=macs, variants=len(sharing) * len(_MEASURED)) if data is not None else None
    candidates: list[list[Candidate]] = []
    for layer, whole in zip(sharing, costs, strict=True):
        weight = read_weight(graph, layer)
        curves = [_curve(layer, weight, form, moments.get(layer.name)) for form in forms[layer.name]]
        found = _candidates(layer, [curve for curve in curves if curve is not None], probe, unit)
        candidates.append([Candidate(None, (), whole, 0.0), *(each for each in found if each.cost < whole)])
        if progress:
            progress(len(candidates), len(sharing))
    chosen = allocate(candidates, int(keep * sum(costs) + 1e-6))
    taken = [choices[index] for choices, index in zip(candidates, chosen, strict=True)]
    return {
        layer.name: None if each.form is None else (each.form, each.ranks)
        for layer, each in zip(sharing, taken, strict=True)
    }


def _cost(layer: Layer, unit: Unit) -> int:
    if unit == "parameters":
        return layer.parameters
    if layer.macs is None or layer.extents is None:
        raise RecipeError(
            f"the multiply-accumulates of layer {layer.name!r} are unknown, so they cannot be shared out",
            hint="give the input's shape with --shape, or choose --budget-unit parameters",
        )
    return layer.macs


def _candidates(layer: Layer, curves: Sequence[Curve], probe: Probe | None, unit: Unit) -> list[Candidate]:
    """Return the candidates of a layer but itself."""
    if not curves:
        return []
    if probe is None:
        errors = [curve.errors / max(curve.energy, np.finfo(np.float64).tiny) for curve in curves]
    else:
        best = min(curves, key=lambda curve: float(curve.errors[len(curve.errors) // 2]))
        known = _measure(layer, best, probe)
        errors = [interpolate(curve.errors, *known) for curve in curves]
    return [
        Candidate(curve.form, ranks, _form_cost(layer, curve.form, ranks, unit), float(error))
        for curve, found in zip(curves, errors, strict=True)
        for ranks, error in zip(curve.ranks, found, strict=True)
    ]


def _curve(layer: Layer, weight: Array, form: FormName, moments: Moments | None) -> Curve | None:
    """Return the errors of a form over its grid of ranks, ``None`` where no rank has fewer parameters."""
    shape = group_shape(layer)
    whole = dense_parameters(form, shape)
    found = {ranks_for_share(form, shape, step / GRID) for step in range(1, GRID + 1)}
    smaller = {count_parameters(form, shape, ranks): ranks for ranks in sorted(found)}
    grid = [smaller[size] for size in sorted(smaller) if size < whole]
    if not grid:
        return None
    anchors = [_place(share, grid) for share in _ANCHORS]
    return error_curve(form, weight, grid, moments, anchors=anchors, groups=layer.groups)


def _place(share: float, grid: Sequence[Ranks]) -> int:
    return round(share * (len(grid) - 1))


def _measure(layer: Layer, curve: Curve, probe: Probe) -> tuple[Array, Array]:
    """Return errors of a curve, and the divergence of the model's output at each."""
    places = sorted({_place(share, curve.ranks) for share in _MEASURED})
    found = [probe.divergence({layer.name: stored(curve.solved[place], layer)}) for place in places]
    return curve.errors[places], np.array(found)


def interpolate(errors: Array, known_errors: Array, divergences: Array) -> Array:
    """Return the divergence at every error of a layer, from a few that are known, on logarithmic scales.

    Divergences are made to rise with the error. Beyond the known ones they are proportional to the error, as they are
    where a change is small.
    """
    order = np.argsort(known_errors, kind="stable")
    x = np.log(known_errors[order])
    y = np.log(np.maximum.accumulate(np.clip(divergences[order], _SMALLEST_DIVERGENCE, _LARGEST_ERROR)))
    at = np.log(errors)
    beyond = at - np.clip(at, x[0], x[-1])
    return np.asarray(np.exp(np.interp(at, x, y) + beyond))


def _form_cost(layer: Layer, form: FormName, ranks: Ranks, unit: Unit) -> int:
    """Return what a form costs in place of the weight (the bias that ``svd_bias`` takes over counts as saved)."""
    shape = group_shape(layer)
    if unit == "parameters":
        added = count_parameters(form, shape, ranks) - dense_parameters(form, shape)
        return layer.parameters + layer.groups * added
    return layer.groups * sum(
        each.rows * count_macs(form, shape, ranks, inputs=each.inputs, outputs=each.outputs)
        for each in layer.extents or ()
    )
