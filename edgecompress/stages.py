"""The stages between the plan and the file: every layer is solved first, then the graph is rewritten."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.calibrate import calibrate
from edgecompress.cluster.forms import Grid
from edgecompress.container import PackResult, pack
from edgecompress.errors import RecipeError
from edgecompress.evidence import Outcome
from edgecompress.graph import constants, open_graph
from edgecompress.layers import Layer, Skip, find_layers
from edgecompress.passes.biases import add_biases, bias_names, set_constants
from edgecompress.passes.factorize import factorize
from edgecompress.passes.pairs import Pair, find_pairs
from edgecompress.passes.precision import choose_int8, run_int8
from edgecompress.passes.quantize import eight_bits
from edgecompress.passes.run import run_pass
from edgecompress.passes.shrink import shrink, solve_shrink
from edgecompress.passes.solve import Calibration, Solution, solve_layers
from edgecompress.passes.weights import values_as_stored, write_values
from edgecompress.save import save_model
from edgecompress.sequential import Walk

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.model import Array, Model
    from edgecompress.plan import LayerPlan, Plan
    from edgecompress.values import Values

    Feeds = Mapping[str, Array] | None
    Progress = Callable[[int, int], None] | None


def packed_size(model: Model) -> PackResult:
    """Return what a model takes in a container, which is not kept."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder, "model.onnx"))
        return pack(Path(folder, "model.onnx"), Path(folder, "model.ecz"))


def layers_in(entries: Sequence[Layer | Skip]) -> list[Layer]:
    """Return the entries that are layers."""
    return [entry for entry in entries if isinstance(entry, Layer)]


def with_biases(model: Model, plan: Plan, feeds: Feeds) -> tuple[Model, dict[str, str]]:
    """Give every changed layer that can have a bias one; return the model, and by layer the constants of all biases.

    A layer whose weight absorbs its bias has none that may be corrected.
    """
    changed = [entry.layer for entry in plan.layers if entry.factorize is not None or entry.weights is not None]
    absorbed = {entry.layer for entry in plan.layers if _absorbs_bias(entry)}
    model, _ = run_pass(
        model, "biases", lambda graph: add_biases(graph, layers_in(find_layers(graph)), {*changed} - absorbed), feeds
    )
    graph = open_graph(model)
    return model, bias_names(graph, [layer for layer in layers_in(find_layers(graph)) if layer.name not in absorbed])


def run_shrink(
    model: Model,
    data: DataSet,
    wanted: Callable[[Mapping[str, Pair]], Mapping[str, int]],
    *,
    asymmetric: bool,
    feeds: Feeds,
    progress: Progress,
) -> tuple[Model, dict[str, int]]:
    """Take outputs away from layers that just one other layer reads, and refit that one; return what each keeps.

    ``wanted`` says how many outputs to keep, for the pairs that there are. Raises ``RecipeError`` for a layer that has
    no such reader, with the reason.
    """
    found = _pairs(model)
    pairs = {name: pair for name, pair in found.items() if isinstance(pair, Pair)}
    counts = dict(wanted(pairs))
    for name, count in counts.items():
        if name not in pairs:
            why = found.get(name, "the model has no such layer")
            raise RecipeError(f"layer {name!r} cannot shrink: {why}", hint="leave it out of the plan's shrink")
        if count > pairs[name].units:
            raise RecipeError(
                f"layer {name!r} cannot shrink to {count} outputs: it has {pairs[name].units}",
                hint="correct the plan's shrink",
            )
    counts = {name: count for name, count in counts.items() if count < pairs[name].units}
    readers = {pairs[name].consumer.name for name in counts}
    model, _ = run_pass(model, "biases", lambda graph: add_biases(graph, layers_in(find_layers(graph)), readers), feeds)
    graph = open_graph(model)
    layers = layers_in(find_layers(graph))
    known = Calibration(
        moments=calibrate(model, [layer for layer in layers if layer.name in readers], data),
        biases=bias_names(graph, layers),
        walk=partial(Walk, model, data),
        asymmetric=asymmetric,
    )
    again = [pair for pair in find_pairs(graph, layers).values() if isinstance(pair, Pair)]
    shrunk = solve_shrink(graph, again, counts, known, progress=progress)
    model, _ = run_pass(model, "shrink", lambda graph: shrink(graph, layers_in(find_layers(graph)), shrunk), feeds)
    return model, counts


def _pairs(model: Model) -> dict[str, Pair | str]:
    graph = open_graph(model)
    return find_pairs(graph, layers_in(find_layers(graph)))


def _absorbs_bias(entry: LayerPlan) -> bool:
    return entry.factorize is not None and entry.factorize.scheme == "svd_bias"


def run_stages(
    model: Model,
    entries: Sequence[Layer | Skip],
    plan: Plan,
    known: Calibration,
    *,
    data: DataSet | None,
    free: Mapping[str, tuple[int, ...]],
    feeds: Feeds,
    progress: Progress,
) -> tuple[Model, Outcome]:
    """Do what the plan says; return the final model and what became of the layers.

    ``free`` gives the input shapes that MACs are counted for; int8 takes the ranges of activations from ``data``.
    """
    before, layers = open_graph(model), layers_in(entries)
    found = solve_layers(before, layers, plan, known, progress=progress)
    forms = {name: solution.form for name, solution in found.items() if solution.form is not None}
    result, changes = run_pass(
        model, "factorize", lambda graph: factorize(graph, layers_in(find_layers(graph)), forms), feeds
    )
    biases = {known.biases[name]: each.bias for name, each in found.items() if each.bias is not None}
    result, _ = run_pass(result, "correct", lambda graph: set_constants(graph, biases), feeds)
    parts: dict[str, tuple[str, ...]] = {layer.name: (layer.name,) for layer in layers}
    parts |= {change.layer: change.tensors for change in changes if change.layer in parts}
    after = open_graph(result)
    outcome = Outcome(
        before=before,
        after=after,
        entries=entries,
        plan=plan,
        parts=parts,
        forms=forms,
        clusters=_by_constant(layers, found, parts, constants(after)),
        moments=known.moments,
        macs={layer.name: layer.macs for layer in layers_in(find_layers(after, free))},
    )
    if data is None or plan.quantize == "none":
        final, _ = run_pass(result, "cluster", lambda graph: write_values(graph, outcome.clusters), feeds)
        return final, outcome
    return _in_int8(result, outcome, data, feeds)


def _in_int8(model: Model, outcome: Outcome, data: DataSet, feeds: Feeds) -> tuple[Model, Outcome]:
    """Return the model with what can be in int8, and the outcome with the codes that this gives to other weights."""
    grids = {name: form for name, form in outcome.clusters.items() if isinstance(form, Grid)}
    chosen = choose_int8(model, grids, data)
    graph = open_graph(model)
    layers = [layer for layer in layers_in(find_layers(graph)) if layer.name in chosen.names]
    grids |= {layer.name: eight_bits(graph, layer) for layer in layers if layer.name not in grids}
    model, _ = run_int8(model, chosen.names, chosen.ranges, grids, feeds=feeds)
    rest = {name: form for name, form in outcome.clusters.items() if name not in chosen.names}
    final, _ = run_pass(model, "cluster", lambda graph: write_values(graph, rest), feeds)
    codes = {name: grids[name] for name in chosen.names}
    return final, replace(outcome, clusters={**outcome.clusters, **codes}, int8=chosen.names, kept_float=chosen.reasons)


def _by_constant(
    layers: Sequence[Layer],
    found: Mapping[str, Solution],
    parts: Mapping[str, tuple[str, ...]],
    present: Mapping[str, Array],
) -> dict[str, Values]:
    """Return the values of layers and factors by the constant that holds them, shaped as it is."""
    clusters = {}
    for layer in layers:
        for name, values in zip(
            parts[layer.name], found[layer.name].values if layer.name in found else (), strict=False
        ):
            if values is not None:
                clusters[name] = values_as_stored(values, layer, tuple(present[name].shape))
    return clusters
