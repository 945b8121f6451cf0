"""The stages between the plan and the file: factorize, cluster, correct. Each solves first and rewrites then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from edgecompress.evidence import Outcome, dense_weight, is_changed
from edgecompress.graph import constants, open_graph, values_of
from edgecompress.layers import Layer, Skip, find_layers
from edgecompress.passes.biases import add_biases, bias_names, set_constants
from edgecompress.passes.factorize import factorize
from edgecompress.passes.run import run_pass
from edgecompress.passes.solve import Calibration, solve_corrections, solve_forms
from edgecompress.passes.weights import codebooks, solve_codebooks

if TYPE_CHECKING:
    from edgecompress.model import Array, Model
    from edgecompress.plan import LayerPlan, Plan

    Feeds = Mapping[str, Array] | None
    Progress = Callable[[int, int], None] | None


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


def _absorbs_bias(entry: LayerPlan) -> bool:
    return entry.factorize is not None and entry.factorize.scheme == "svd_bias"


def run_factorize(
    model: Model,
    entries: Sequence[Layer | Skip],
    plan: Plan,
    known: Calibration,
    *,
    free: Mapping[str, tuple[int, ...]],
    feeds: Feeds,
    progress: Progress,
) -> Outcome:
    """Factorize as the plan says; ``free`` gives the input shapes that MACs are counted for."""
    before, layers = open_graph(model), layers_in(entries)
    forms = solve_forms(before, layers, plan, known, progress=progress)
    result, changes = run_pass(
        model, "factorize", lambda graph: factorize(graph, layers_in(find_layers(graph)), forms), feeds
    )
    parts = {layer.name: (layer.name,) for layer in layers}
    after = open_graph(result)
    return Outcome(
        before=before,
        after=after,
        entries=entries,
        plan=plan,
        parts=parts | {change.layer: change.tensors for change in changes if change.layer in parts},
        forms=forms,
        clusters={},
        moments=known.moments,
        macs={layer.name: layer.macs for layer in layers_in(find_layers(after, free))},
    )


def run_cluster(outcome: Outcome, progress: Progress) -> Outcome:
    """Find the clusters that the plan asks for; the graph holds them only once they are written."""
    clusters = solve_codebooks(
        outcome.after,
        layers_in(outcome.entries),
        outcome.plan,
        outcome.parts,
        moments=outcome.moments,
        progress=progress,
    )
    return replace(outcome, clusters=clusters)


def run_correct(outcome: Outcome, known: Calibration, *, feeds: Feeds, progress: Progress) -> Outcome:
    """Set the outputs of the layers right: in the biases, and by a gain in what of each layer is applied last."""
    layers = layers_in(outcome.entries)
    dense = {layer.name: partial(dense_weight, outcome, layer) for layer in layers if is_changed(outcome, layer)}
    present, clusters = constants(outcome.after), dict(outcome.clusters)
    values: dict[str, Array] = {}
    for layer, correction in solve_corrections(outcome.before, layers, dense, known, progress=progress).items():
        last = outcome.parts[layer][-1]
        if last in clusters:
            clusters[last] = clusters[last].scaled(correction.gain)
        elif layer in dense:
            factor = values_of(outcome.after, present[last])
            values[last] = (factor * correction.gain).astype(factor.dtype)
        if correction.bias is not None:
            values[known.biases[layer]] = correction.bias
    model, _ = run_pass(outcome.after.model, "correct", lambda graph: set_constants(graph, values), feeds)
    return replace(outcome, after=open_graph(model), clusters=clusters)


def write_clusters(outcome: Outcome, feeds: Feeds) -> Model:
    """Return the model with its clusters as codebooks and indices."""
    model, _ = run_pass(outcome.after.model, "cluster", lambda graph: codebooks(graph, outcome.clusters), feeds)
    return model
