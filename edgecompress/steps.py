"""Size the steps of grids: which layer gets a wider one, and how wide all of them are for a budget of bits or bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from edgecompress.cluster.feedback import eliminate
from edgecompress.cluster.grid import entropy_bits, grid_step, to_grid
from edgecompress.errors import BudgetError
from edgecompress.orientation import read_weight, stored
from edgecompress.sensitivity import Probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgecompress.data import DataSet
    from edgecompress.graph import Graph
    from edgecompress.layers import Layer
    from edgecompress.moments import Moments
    from edgecompress.plan import Plan

T = TypeVar("T")
Progress = Callable[[int, int], None]

PROBED_SIGMAS = 1.4
"""The step at which the model is run with one layer rounded: where the interesting budgets are."""

LARGEST_SIGMAS = 12.0
"""Steps are no wider than this: hardly a weight is left that is not zero."""

_SPREAD = 4.0
_ATTEMPTS = 6
_PATIENCE = 3
_SLACK = 0.01
_SAMPLE = 1 << 16


def relative_steps(
    graph: Graph,
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    data: DataSet | None,
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return how wide the step of each layer is beside the others', their weighted geometric mean being 1.

    ``(n / d)^(1/4)`` with ``n`` the layer's weights and ``d`` how far the model's output diverges when only this layer
    is rounded to ``PROBED_SIGMAS``, with feedback where its ``moments`` are known: rounded without, a layer does what
    it never does in the end. For a divergence that is quadratic in the error the exponent would be 1/2, where another
    bit saves every layer alike; as rounded layers disturb each other, half of it is better in practice.
    Without data all are alike.
    """
    if data is None:
        return {layer.name: 1.0 for layer in layers}
    probe = Probe(graph.model, data, macs=sum(layer.macs or 0 for layer in layers), variants=len(layers))
    logs = []
    for number, layer in enumerate(layers, start=1):
        weight = read_weight(graph, layer)
        known = moments.get(layer.name)
        elimination = None if known is None else eliminate(known)
        rounded = to_grid(weight, grid_step(weight, PROBED_SIGMAS), elimination).to_dense()
        found = probe.divergence({layer.name: stored(rounded, layer)})
        logs.append(math.log(layer.parameters / max(found, 1e-9)) / 4 if math.isfinite(found) else 0.0)
        if progress:
            progress(number, len(layers))
    mean = float(np.average(logs, weights=[layer.parameters for layer in layers]))
    return {
        layer.name: float(np.clip(math.exp(log - mean), 1 / _SPREAD, _SPREAD))
        for layer, log in zip(layers, logs, strict=True)
    }


def scale_for_bits(graph: Graph, layers: Sequence[Layer], relative: Mapping[str, float], bits: float) -> float:
    """Return the common factor of all steps, in units of each layer's spread, at which codes have ``bits`` of entropy.

    Of the weights as they are, on a sample of each layer: a first guess.
    """
    samples = []
    for layer in layers:
        flat = read_weight(graph, layer).reshape(-1)
        samples.append((flat[:: max(1, flat.size // _SAMPLE)].astype(np.float32), layer))
    total = sum(layer.parameters for layer in layers)
    low, high = math.log(1e-3), math.log(LARGEST_SIGMAS)
    for _ in range(24):
        middle = (low + high) / 2
        spent = 0.0
        for sample, layer in samples:
            grid = to_grid(sample, grid_step(sample, relative[layer.name] * math.exp(middle)))
            spent += entropy_bits(grid.codes) / sample.size * layer.parameters
        low, high = (middle, high) if spent > bits * total else (low, middle)
    return math.exp(high)


def grid_layers(plan: Plan, layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers whose weights the plan puts on a grid."""
    chosen = {entry.layer for entry in plan.layers if entry.weights is not None and entry.weights.scheme == "grid"}
    return [layer for layer in layers if layer.name in chosen]


def with_steps(plan: Plan, relative: Mapping[str, float], scale: float) -> Plan:
    """Return the plan with the step of every grid ``scale`` times its share."""
    layers = []
    for entry in plan.layers:
        weights = entry.weights
        if weights is not None and weights.scheme == "grid":
            weights = replace(weights, step=min(LARGEST_SIGMAS, scale * relative.get(entry.layer, 1.0)))
        layers.append(replace(entry, weights=weights))
    return replace(plan, layers=tuple(layers))


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What came of one scale: how much of the budget was ``spent``, and the coded ``bits`` of a weight."""

    result: T
    spent: float
    bits: float


def fit_scale(attempt: Callable[[float], Attempt[T]], first: float, budget: float, *, per_bit: float, unit: str) -> T:
    """Return the result of the smallest scale found that is within ``budget``, met from below within 1 %.

    A few attempts: the second goes by the entropy, which falls by about one bit a weight where steps double; the later
    ones by the line through the nearest two, once there are two to lie between. ``per_bit`` is how much of the budget
    one bit a weight takes, ``unit`` what it is counted in.

    Raises:
        BudgetError: even the widest steps spend more.
    """
    tried: list[tuple[float, Attempt[T]]] = []
    scale = first
    for _ in range(_ATTEMPTS):
        found = attempt(scale)
        tried.append((scale, found))
        done = budget * (1 - _SLACK) <= found.spent <= budget
        if done or (scale >= LARGEST_SIGMAS and found.spent > budget):
            break
        scale = min(LARGEST_SIGMAS, _next_scale(tried, budget, per_bit))
    within = [(scale, found) for scale, found in tried if found.spent <= budget]
    if not within:
        least = min(found.spent for _, found in tried)
        raise BudgetError(
            f"the budget of {budget:g} {unit} is out of reach: the least that was found is {least:g}",
            hint="raise the budget, or factorize or prune as well",
        )
    return min(within, key=lambda pair: pair[0])[1].result


def _next_scale(tried: Sequence[tuple[float, Attempt[T]]], budget: float, per_bit: float) -> float:
    """Return where to try next: aim just below the budget."""
    aim = budget * (1 - _SLACK / 2)
    below = [pair for pair in tried if pair[1].spent <= budget]
    above = [pair for pair in tried if pair[1].spent > budget]
    if below and above:
        (low, over), (high, under) = max(above, key=lambda pair: pair[0]), min(below, key=lambda pair: pair[0])
        share = (over.spent - aim) / (over.spent - under.spent)
        return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    if len(above) >= _PATIENCE:
        return LARGEST_SIGMAS  # say whether the budget can be met at all
    scale, last = tried[-1]
    # where few weights are left that are not zero, wider steps save less than a bit
    saved = per_bit * min(1.0, last.bits) / math.log(2)
    return scale * math.exp(float(np.clip((last.spent - aim) / max(saved, 1e-9), -1.5, 1.5)))
