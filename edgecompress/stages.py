"""The stages between the plan and the file: every layer is solved first, then the graph is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from edgecompress.evidence import Outcome
from edgecompress.graph import constants, open_graph
from edgecompress.layers import Layer, Skip, find_layers
from edgecompress.passes.biases import add_biases, bias_names, set_constants
from edgecompress.passes.factorize import factorize
from edgecompress.passes.run import run_pass
from edgecompress.passes.solve import Calibration, Solution, solve_layers
from edgecompress.passes.weights import values_as_stored, write_values

if TYPE_CHECKING:
    from edgecompress.model import Array, Model
    from edgecompress.plan import LayerPlan, Plan
    from edgecompress.values import Values

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


def run_stages(
    model: Model,
    entries: Sequence[Layer | Skip],
    plan: Plan,
    known: Calibration,
    *,
    free: Mapping[str, tuple[int, ...]],
    feeds: Feeds,
    progress: Progress,
) -> tuple[Model, Outcome]:
    """Do what the plan says; return the final model and what became of the layers.

    ``free`` gives the input shapes that MACs are counted for.
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
    final, _ = run_pass(result, "cluster", lambda graph: write_values(graph, outcome.clusters), feeds)
    return final, outcome


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
