"""Remove units of layers: choose them, fit the layers that read them again, and rewrite the graph."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.factorize.shrink import refit, select_units, take_units
from edgecompress.graph import Graph, constants, fresh_name, values_of
from edgecompress.moments import PairedMoments, centred, centred_pair, output_errors, refitted
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.pairs import Pair, find_pairs, reshaped_to
from edgecompress.passes.run import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.passes.solve import Calibration
    from edgecompress.sequential import Walk

    Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The units that a layer keeps, and what the layer that reads them becomes.

    ``kept`` are their indices, rising. ``weight`` is the canonical weight of the ``consumer``, still of its full shape:
    zero for what reads a unit that is removed. ``bias`` holds the new values of the constant ``bias_name``, both
    ``None`` where there is none that may change. ``signal`` and ``error`` are the energies of the consumer's outputs
    and of what they lose on the calibration data.
    """

    consumer: str
    units: int
    kept: Array
    weight: Array
    bias_name: str | None
    bias: Array | None
    signal: float
    error: float


def solve_shrink(
    graph: Graph,
    pairs: Sequence[Pair],
    wanted: Mapping[str, int],
    known: Calibration,
    *,
    progress: Progress | None = None,
) -> dict[str, Shrunk]:
    """Find, for every layer in ``wanted``, the units that it keeps, as many as are wanted, and its consumer's weight.

    Where the consumer has a bias that may change, it takes up the mean: the covariance of the inputs counts, not their
    second moment. In the asymmetric case the consumer is fitted to what it gives in the original from what the model
    shrunk so far gives it; else each pair is solved as if it were the only one. Every consumer needs moments.
    """
    places = {id(node): place for place, node in enumerate(graph.surgeon.nodes)}
    chosen = [pair for pair in pairs if pair.layer.name in wanted]
    chosen.sort(key=lambda pair: places[id(pair.consumer.nodes[0])])  # the order in which a walk meets them
    walk = known.walk([pair.consumer for pair in chosen]) if known.walk is not None and known.asymmetric else None
    found: dict[str, Shrunk] = {}
    for pair in chosen:
        paired = walk.pair(pair.consumer) if walk is not None else None
        solved = _solve(graph, pair, wanted[pair.layer.name], known, paired)
        if walk is not None:
            _settle(pair, solved, walk)
        found[pair.layer.name] = solved
        if progress:
            progress(len(found), len(chosen))
    return found


def _solve(graph: Graph, pair: Pair, count: int, known: Calibration, paired: PairedMoments | None) -> Shrunk:
    name = pair.consumer.name
    bias_name = known.biases.get(name)
    weight = read_weight(graph, pair.consumer)
    moments, target = known.moments[name], weight.astype(np.float64)
    before = after = moments.mean
    if paired is not None:
        moments, before, after = paired.moments, paired.source_mean, paired.moments.mean
        target = refitted(weight, centred_pair(paired) if bias_name else paired)
    moments = centred(moments) if bias_name else moments
    kept = select_units(target, moments, pair.units, count)
    fitted = refit(target, moments, pair.units, kept).astype(weight.dtype)
    bias = None
    if bias_name is not None and before is not None and after is not None:
        old = values_of(graph, constants(graph)[bias_name])
        bias = old + (_rows(weight) @ before[0] - _rows(fitted) @ after[0]).reshape(old.shape)
        bias = bias.astype(old.dtype)
    signal, error = output_errors(target, fitted, moments)
    return Shrunk(
        consumer=name,
        units=pair.units,
        kept=kept,
        weight=fitted,
        bias_name=None if bias is None else bias_name,
        bias=bias,
        signal=signal,
        error=error,
    )


def _rows(weight: Array) -> Array:
    return weight.reshape(weight.shape[0], -1).astype(np.float64)


def _settle(pair: Pair, solved: Shrunk, walk: Walk) -> None:
    values = {pair.consumer.name: stored(solved.weight, pair.consumer)}
    if solved.bias_name is not None and solved.bias is not None:
        values[solved.bias_name] = solved.bias
    walk.settle(pair.consumer, values)


def shrink(graph: Graph, layers: Sequence[Layer], shrunk: Mapping[str, Shrunk]) -> Sequence[Change]:
    """Remove the units that the layers named in ``shrunk`` do not keep.

    The changes name the consumers with their full-size weights, zero for the units removed: with these the model as it
    was computes what the smaller one does.
    """
    found = find_pairs(graph, layers)
    pairs = [pair for pair in found.values() if isinstance(pair, Pair) and pair.layer.name in shrunk]
    changes: list[Change] = []
    for pair in pairs:  # before any constant loses units: a layer may be the consumer of one pair and lose its own
        changes.extend(_refit_consumer(graph, pair, shrunk[pair.layer.name]))
    return [*changes, *(_remove_units(graph, pair, shrunk[pair.layer.name].kept) for pair in pairs)]


def _refit_consumer(graph: Graph, pair: Pair, solved: Shrunk) -> list[Change]:
    layer = pair.consumer
    layer.constant.values = np.ascontiguousarray(stored(take_units(solved.weight, pair.units, solved.kept), layer))
    changes = [Change(layer.name, "fitted again", dense=functools.partial(stored, solved.weight, layer))]
    if solved.bias_name is not None and solved.bias is not None:
        constants(graph)[solved.bias_name].values = solved.bias
        changes.append(Change(solved.bias_name, "fitted again", dense=functools.partial(np.asarray, solved.bias)))
    return changes


def _remove_units(graph: Graph, pair: Pair, kept: Array) -> Change:
    axis = 1 if pair.layer.orientation == "transposed" else 0
    weight = pair.layer.constant
    weight.values = np.ascontiguousarray(np.take(values_of(graph, weight), kept, axis=axis))
    for slot in pair.slots:
        constant = slot.node.inputs[slot.position]
        _replace(graph, slot.node, slot.position, np.take(values_of(graph, constant), kept, axis=slot.axis))
    if pair.reshape is not None:
        asked = reshaped_to(graph, pair.reshape)
        if asked is not None and asked[1] != -1:
            sizes = np.array([asked[0], pair.block * len(kept)], np.int64)
            _replace(graph, pair.reshape, 1, sizes)
    _forget_shapes(graph, pair)
    return Change(pair.layer.name, f"{len(kept)} of {pair.units} units kept")


def _replace(graph: Graph, node: gs.Node, position: int, values: Array) -> None:
    """Give an input other values; a constant that something else uses, too, stays and gets a sibling."""
    constant = node.inputs[position]
    if len(constant.outputs) == 1 and constant.name not in graph.output_names | graph.body_names:
        constant.values = np.ascontiguousarray(values)
    else:
        node.inputs[position] = gs.Constant(fresh_name(graph, f"{constant.name}.shrunk"), np.ascontiguousarray(values))


def _forget_shapes(graph: Graph, pair: Pair) -> None:
    """Give new names to the tensors between the two layers whose shapes the file states: they are others now."""
    stated = {value.name for value in graph.model.proto.graph.value_info}
    for tensor in pair.between:
        if tensor.name in stated:
            tensor.name = fresh_name(graph, f"{tensor.name}.shrunk")
