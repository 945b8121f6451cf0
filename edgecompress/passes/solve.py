"""Find what takes each layer's place, in graph order: its form, its few values, its gain and bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.cluster.codebook import to_codebook
from edgecompress.cluster.feedback import eliminate
from edgecompress.cluster.forms import Clustered
from edgecompress.cluster.grid import grid_step, to_grid
from edgecompress.cluster.kmeans import kmeans
from edgecompress.cluster.prune import prune
from edgecompress.factorize.factors import factors, with_factors
from edgecompress.factorize.forms import AffineLowRank
from edgecompress.factorize.solve import solve_layer
from edgecompress.graph import Graph, constants, values_of
from edgecompress.moments import Moments, centred, centred_pair, refitted
from edgecompress.orientation import bias_of, read_bias, read_weight, stored
from edgecompress.passes.biases import rounded_bias
from edgecompress.plan import pays_off
from edgecompress.values import quantise_form

if TYPE_CHECKING:
    from edgecompress.factorize.factors import Form
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.plan import LayerPlan, Plan, WeightsPlan
    from edgecompress.sequential import OutputMoments, Walk
    from edgecompress.values import Values

    Progress = Callable[[int, int], None]

_GAINS = 0.5, 2.0
"""A layer whose outputs are further off than this is broken in a way that no gain mends."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is known of a model's activations.

    ``moments`` are by layer, of the original; ``biases`` names the constant of each layer's bias that may be corrected;
    ``walk`` makes a new walk through both models for the layers it is given, ``None`` without data; ``asymmetric`` and
    ``correct`` say what it is used for. ``feedback``: values make up for the errors of those chosen before.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    walk: Callable[[Sequence[Layer]], Walk] | None = None
    asymmetric: bool = False
    correct: bool = False
    feedback: bool = False


@dataclass(frozen=True)
class Solution:
    """What a layer becomes: a form or none, the values of its factors (of its weight) or None, its new bias or None.

    ``form`` multiplies out to what the values say; ``values`` has one entry per factor, canonical.
    """

    form: Form | None
    values: tuple[Values | None, ...]
    bias: Array | None = None

    @property
    def is_changed(self) -> bool:
        """Whether the weight is another one."""
        return self.form is not None or self.values[0] is not None

    def to_dense(self) -> Array:
        """Return the canonical weight of a changed layer."""
        if self.form is not None:
            return self.form.to_dense()
        assert self.values[0] is not None
        return self.values[0].to_dense()

    def scaled(self, gain: float) -> Solution:
        """Return what gives ``gain`` times the weight: in the factor that is applied last."""
        *others, last = self.values
        scaled = None if last is None else last.scaled(gain)
        if self.form is None:
            return replace(self, values=(*others, scaled))
        *arrays, array = factors(self.form)
        array = (array * gain).astype(array.dtype) if scaled is None else scaled.to_dense()
        return replace(self, form=with_factors(self.form, [*arrays, array]), values=(*others, scaled))


def solve_layers(
    graph: Graph, layers: Sequence[Layer], plan: Plan, known: Calibration, *, progress: Progress | None = None
) -> dict[str, Solution]:
    """Solve every layer that the plan changes, and the bias of every other one that an earlier change has put off.

    Calibrated layers are solved under the covariance of their input where a bias takes up the mean, else under its
    second moment. In the asymmetric case it is that of the model compressed so far, for the weight refitted to it, so
    that a layer makes up for the errors of those before it.

    Errors of the weights work like noise that is not correlated with the signal: they shrink the outputs and shift
    them, and every layer adds to it. Where ``known.correct``, a gain per weight and a bias per output give the outputs
    of each layer the mean and the spread back that they have in the original, in closed form and at no cost.

    Raises ``ModelError`` for NaN or Inf weights.
    """
    plans = {entry.layer: entry for entry in plan.layers}
    changed = {name for name, entry in plans.items() if entry.factorize is not None or entry.weights is not None}
    walked = known.walk is not None and (known.asymmetric or known.correct) and bool(changed)
    chosen = [layer for layer in layers if layer.name in changed or (walked and layer.name in known.biases)]
    walk = known.walk(chosen) if walked and known.walk is not None else None
    found: dict[str, Solution] = {}
    for number, layer in enumerate(chosen, start=1):
        weight, entry = read_weight(graph, layer), plans[layer.name]
        solution = Solution(None, (None,))
        if layer.name in changed:
            is_calibrated = any(stage and stage.calibrated for stage in (entry.factorize, entry.weights))
            moments, target = _problem(layer, weight, known, walk) if is_calibrated else (None, weight)
            solution = _solved(graph, layer, entry, (target, moments), feedback=known.feedback)
        if walk is not None:
            solution = _settled(graph, layer, weight, solution, known=known, walk=walk)
        found[layer.name] = solution
        if progress:
            progress(number, len(chosen))
    return found


def _problem(layer: Layer, weight: Array, known: Calibration, walk: Walk | None) -> tuple[Moments | None, Array]:
    """Return the moments to solve a layer under, None without any, and the weight to come near to."""
    moments, correctable = known.moments.get(layer.name), layer.name in known.biases
    if moments is not None and walk is not None and known.asymmetric:
        pair = walk.pair(layer)
        pair = centred_pair(pair) if correctable else pair
        return pair.moments, refitted(weight, pair).astype(weight.dtype)
    return (centred(moments) if moments is not None and correctable else moments), weight


def _solved(
    graph: Graph, layer: Layer, entry: LayerPlan, problem: tuple[Array, Moments | None], *, feedback: bool
) -> Solution:
    """Return the form and the values that the plan asks for."""
    (target, moments), form, values = problem, None, entry.weights
    if entry.factorize is not None:
        used = moments if entry.factorize.calibrated else None
        bias = read_bias(graph, layer)
        scheme, ranks = entry.factorize.scheme, entry.factorize.ranks
        form = solve_layer(scheme, target, ranks, used, groups=layer.groups, bias=bias)
    if values is None:
        return Solution(form, (None,) * (1 if form is None else len(factors(form))))
    used = moments if values.calibrated else None
    assign = partial(_assign, values, feedback)
    if form is None:
        # channels of a depthwise convolution differ too much in size for one step
        several = layer.op == "Conv" and layer.groups > 1 and used is not None
        return Solution(None, (assign(target, used, per_channel=several),))
    return Solution(*quantise_form(form, target, used, assign, pays_off=partial(_pays_off, values)))


def _assign(
    asked: WeightsPlan, feedback: bool, weight: Array, moments: Moments | None, *, per_channel: bool = False
) -> Values:
    """Return the few values of a canonical weight or factor."""
    elimination = eliminate(moments) if moments is not None and feedback else None
    keep = None
    if asked.prune:
        weight = prune(weight, asked.prune, moments if feedback else None)
        keep = weight != 0
    if asked.step is not None:
        return to_grid(weight, grid_step(weight, asked.step, per_channel=per_channel), elimination, keep=keep)
    assert asked.bits is not None
    if elimination is not None and moments is not None:
        return to_codebook(weight, 2**asked.bits, moments, elimination, keep=keep)
    form = kmeans(weight, 2**asked.bits, _importance(weight, moments))
    return form if keep is None else _with_zero(form)


def _importance(weight: Array, moments: Moments | None) -> Array | None:
    """Return how much a squared error of each value adds to that of the output: the mean square of its input."""
    if moments is None:
        return None
    groups, columns = moments.diagonal.shape
    rows = np.broadcast_to(moments.diagonal[:, None], (groups, len(weight) // groups, columns))
    return rows.reshape(weight.shape)


def _with_zero(form: Clustered) -> Clustered:
    """Return the clusters with the centroid next to zero exactly there, where what is pruned is."""
    codebook = form.codebook.copy()
    codebook[np.argmin(np.abs(codebook))] = 0
    return Clustered(codebook, form.indices)


def _pays_off(asked: WeightsPlan, factor: Array) -> bool:
    return pays_off(asked, factor.size, factor.itemsize)


def _settled(
    graph: Graph, layer: Layer, weight: Array, solution: Solution, *, known: Calibration, walk: Walk
) -> Solution:
    """Put a solution in a layer's place, its outputs set right; return it with its gain and bias."""
    now = solution.to_dense() if solution.is_changed else weight
    values: dict[str, Array] = {}
    if isinstance(solution.form, AffineLowRank):
        absorbed: Any = bias_of(layer)
        values[absorbed.name] = solution.form.bias_to_dense().reshape(absorbed.shape).astype(weight.dtype)
    elif known.correct and layer.takes_moments:
        outputs = walk.outputs(layer, weight, now)
        gain = _gain(outputs) if solution.is_changed else 1.0
        if solution.is_changed:
            solution = solution.scaled(gain)
            now = solution.to_dense()
        if layer.name in known.biases:
            bias = values_of(graph, constants(graph)[known.biases[layer.name]])
            shift = outputs.means[0] - gain * outputs.means[1]
            corrected = (bias + shift.reshape(bias.shape)).astype(bias.dtype)
            if any(own is not None for own in solution.values):
                corrected = rounded_bias(corrected, outputs.variances[0])
            values[known.biases[layer.name]] = corrected
            solution = replace(solution, bias=corrected)
    walk.settle(layer, {layer.name: stored(now.astype(weight.dtype), layer), **values})
    return solution


def _gain(outputs: OutputMoments) -> float:
    """Return what gives the outputs their variance back, 1 where they never vary."""
    before, after = outputs.variances.sum(axis=1)
    return float(np.clip(np.sqrt(before / after), *_GAINS)) if before > 0 and after > 0 else 1.0
