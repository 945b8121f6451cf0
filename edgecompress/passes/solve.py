"""Find what takes each layer's place, in graph order, and the gain and bias that set its outputs right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.factorize.factors import factors, with_factors
from edgecompress.factorize.forms import AffineLowRank
from edgecompress.factorize.solve import solve_layer
from edgecompress.graph import Graph, constants, values_of
from edgecompress.moments import centred, centred_pair, refitted
from edgecompress.orientation import bias_of, read_bias, read_weight, stored

if TYPE_CHECKING:
    from edgecompress.factorize.factors import Form
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.moments import Moments
    from edgecompress.plan import Plan
    from edgecompress.sequential import OutputMoments, Walk

    Progress = Callable[[int, int], None]

_GAINS = 0.5, 2.0
"""A layer whose outputs are further off than this is broken in a way that no gain mends."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is known of a model's activations.

    ``moments`` are by layer, of the original; ``biases`` names the constant of each layer's bias that may be corrected;
    ``walk`` makes a new walk through both models for the layers it is given, ``None`` without data; ``asymmetric`` and
    ``correct`` say what it is used for.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    walk: Callable[[Sequence[Layer]], Walk] | None = None
    asymmetric: bool = False
    correct: bool = False


@dataclass(frozen=True)
class Correction:
    """What sets a layer's outputs right: a ``gain`` of its weight, and new values of its bias where it has one."""

    gain: float
    bias: Array | None


def solve_forms(
    graph: Graph, layers: Sequence[Layer], plan: Plan, known: Calibration, *, progress: Progress | None = None
) -> dict[str, Form]:
    """Find the factors of every layer that the plan factorizes. Raises ``ModelError`` for NaN or Inf weights.

    Calibrated layers are solved under the covariance of their input where a bias takes up the mean, else under its
    second moment. In the asymmetric case it is that of the model compressed so far, for the weight refitted to it, so
    that a layer makes up for the errors of those before it.
    """
    wanted = {entry.layer: entry.factorize for entry in plan.layers if entry.factorize is not None}
    chosen = [layer for layer in layers if layer.name in wanted]
    walk = known.walk(chosen) if known.walk is not None and known.asymmetric else None
    forms: dict[str, Form] = {}
    for layer in chosen:
        asked = wanted[layer.name]
        weight = read_weight(graph, layer)
        moments, target = known.moments.get(layer.name) if asked.calibrated else None, weight
        if walk is not None and moments is not None:
            pair = walk.pair(layer)
            pair = centred_pair(pair) if layer.name in known.biases else pair
            moments, target = pair.moments, refitted(weight, pair).astype(weight.dtype)
        elif moments is not None and layer.name in known.biases:
            moments = centred(moments)
        bias = read_bias(graph, layer)
        form = solve_layer(asked.scheme, target, asked.ranks, moments, groups=layer.groups, bias=bias)
        if walk is not None:
            form = _settle(graph, layer, (weight, form), known, walk)
        forms[layer.name] = form
        if progress:
            progress(len(forms), len(wanted))
    return forms


def _settle(graph: Graph, layer: Layer, found: tuple[Array, Form], known: Calibration, walk: Walk) -> Form:
    """Put a form in a layer's place, its outputs set right; return the form, its gain included."""
    weight, form = found
    dense = form.to_dense().astype(weight.dtype)
    values = {}
    if isinstance(form, AffineLowRank):
        absorbed: Any = bias_of(layer)
        values[absorbed.name] = form.bias_to_dense().reshape(absorbed.shape).astype(weight.dtype)
    elif known.correct:
        correction = _correction(graph, layer, known, walk.outputs(layer, weight, dense))
        form = scaled(form, correction.gain)
        dense = form.to_dense().astype(weight.dtype)
        if correction.bias is not None:
            values[known.biases[layer.name]] = correction.bias
    walk.settle(layer, {layer.name: stored(dense, layer), **values})
    return form


def scaled(form: Form, gain: float) -> Form:
    """Return a form of ``gain`` times the weight."""
    *others, last = factors(form)
    return with_factors(form, [*others, (last * gain).astype(last.dtype)])


def solve_corrections(
    graph: Graph,
    layers: Sequence[Layer],
    dense: Mapping[str, Callable[[], Array]],
    known: Calibration,
    *,
    progress: Progress | None = None,
) -> dict[str, Correction]:
    """Return, by layer, what gives its outputs the mean and the spread that they have in the original.

    Errors of the weights work like noise that is not correlated with the signal: they shrink the outputs and shift
    them, and every layer adds to it. A gain per weight and a bias per output undo both, in closed form, at no cost. In
    graph order, so that a layer's correction knows those before it. ``dense`` gives the canonical weight that each
    changed layer has now; of the others only the bias is corrected.
    """
    chosen = [layer for layer in layers if layer.name in dense or layer.name in known.biases]
    if known.walk is None or not known.correct:
        return {}
    walk = known.walk(chosen)
    found: dict[str, Correction] = {}
    for layer in chosen:
        weight = read_weight(graph, layer)
        now = dense[layer.name]() if layer.name in dense else weight
        correction = Correction(1.0, None)
        if layer.takes_moments:
            correction = _correction(graph, layer, known, walk.outputs(layer, weight, now), whole=layer.name in dense)
        values = {layer.name: stored((now * correction.gain).astype(weight.dtype), layer)}
        if correction.bias is not None:
            values[known.biases[layer.name]] = correction.bias
        walk.settle(layer, values)
        found[layer.name] = correction
        if progress:
            progress(len(found), len(chosen))
    return found


def _correction(
    graph: Graph, layer: Layer, known: Calibration, outputs: OutputMoments, *, whole: bool = True
) -> Correction:
    """Return the gain that gives outputs their variance back (1 where not ``whole``), and the bias for their mean."""
    before, after = outputs.variances.sum(axis=1)
    gain = float(np.clip(np.sqrt(before / after), *_GAINS)) if whole and before > 0 and after > 0 else 1.0
    if layer.name not in known.biases:
        return Correction(gain, None)
    bias = values_of(graph, constants(graph)[known.biases[layer.name]])
    shift = outputs.means[0] - gain * outputs.means[1]
    return Correction(gain, (bias + shift.reshape(bias.shape)).astype(bias.dtype))
