"""Choose which layers run in int8: all that can, but for those that move the output too far or get slower."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from edgecompress.graph import open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.passes.align import align
from edgecompress.passes.biases import set_constants
from edgecompress.passes.flow import flow_of, why_float
from edgecompress.passes.islands import losing_islands
from edgecompress.passes.quantize import quantize
from edgecompress.passes.ranges import Range, activation_ranges
from edgecompress.passes.run import run_pass
from edgecompress.sensitivity import Probe

if TYPE_CHECKING:
    from edgecompress.cluster.forms import Grid
    from edgecompress.data import DataSet
    from edgecompress.graph import Graph
    from edgecompress.model import Array, Model
    from edgecompress.passes.run import Change, Pass

    Progress = Callable[[int, int], None] | None

MAX_EFFECT = 0.05
"""What the layers in int8 may move the output by, in sum. All layers together move ResNet-20 by 0.005 and SqueezeNet
1.1 by 0.012 to 0.015, and change their accuracy by at most 0.2 points."""


@dataclass(frozen=True)
class Precision:
    """Which constants run in int8, with the ranges that ``quantize`` needs.

    ``effects`` are, by constant, the divergence of the output when this one alone runs in int8; ``reasons`` say why
    each of the others stays float.
    """

    names: frozenset[str]
    ranges: Mapping[str, Range]
    effects: Mapping[str, float]
    reasons: Mapping[str, str]


def choose_int8(
    model: Model,
    grids: Mapping[str, Grid],
    data: DataSet,
    *,
    max_effect: float = MAX_EFFECT,
    progress: Progress = None,
) -> Precision:
    """Choose the weights of ``model`` that run in int8; those on ``grids`` have their codes.

    Each layer is put into int8 alone, and the one that moves the output most stays float until the sum over the others
    is at most ``max_effect``. Neighbours share the rounding of the tensor between them: the sum counts it twice. Then
    those stay float, too, that int8 makes no faster (see ``losing_islands``).

    Raises:
        ModelError: the runtime cannot run the model on this data.
        DataError: an activation is NaN or Inf.
    """
    model, _ = run_pass(model, "grids", partial(set_constants, values=_dense(grids)), None)
    graph = open_graph(model)
    layers = [entry for entry in find_layers(graph) if isinstance(entry, Layer)]
    reasons = {layer.name: reason for layer in layers if (reason := why_float(layer, model.opset))}
    able = [layer for layer in layers if layer.name not in reasons]
    if not able:
        return Precision(frozenset(), {}, {}, reasons)
    ranges = activation_ranges(model, flow_of(graph, able).ranged, data)
    probe = Probe(model, data, macs=sum(layer.macs or 0 for layer in layers), variants=len(able))
    effects: dict[str, float] = {}
    for done, layer in enumerate(able, 1):
        alone, _ = run_pass(model, "quantize", _quantizing({layer.name}, ranges, grids), None)
        effects[layer.name] = probe.divergence_of(alone)
        if progress:
            progress(done, len(able))
    kept = sorted(effects, key=lambda name: effects[name])
    while math.fsum(effects[name] for name in kept) > max_effect:
        worst = kept.pop()
        reasons[worst] = f"int8 moves the output by {effects[worst]:.2g}"
    lost = losing_islands(graph, [layer for layer in able if layer.name in kept])
    reasons |= dict.fromkeys(lost, "between float layers, int8 would cost more time than it saves")
    kept = [name for name in kept if name not in lost]
    return Precision(frozenset(kept), ranges, effects, reasons)


def run_int8(
    model: Model,
    names: frozenset[str] | set[str],
    ranges: Mapping[str, Range],
    grids: Mapping[str, Grid],
    *,
    feeds: Mapping[str, Array] | None,
) -> tuple[Model, Sequence[Change]]:
    """Return the model with the weights named in int8, checked as ``run_pass`` does, and the changes."""
    quantized, changes = run_pass(model, "quantize", _quantizing(names, ranges, grids), feeds)
    return run_pass(quantized, "align", align, feeds)[0], changes


def _quantizing(names: frozenset[str] | set[str], ranges: Mapping[str, Range], grids: Mapping[str, Grid]) -> Pass:
    def rewrite(graph: Graph) -> Sequence[Change]:
        chosen = [entry for entry in find_layers(graph) if isinstance(entry, Layer) and entry.name in names]
        return quantize(graph, chosen, ranges, grids)

    return rewrite


def _dense(grids: Mapping[str, Grid]) -> dict[str, Array]:
    return {name: grid.to_dense() for name, grid in grids.items()}
