"""Turn a recipe into a plan: what depends on the values of a layer, or on all layers together, is decided here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from edgecompress.allocate import Unit, allocate_ranks
from edgecompress.errors import RecipeError
from edgecompress.factorize.solve import best_form, ranks_by_value
from edgecompress.factorize.spectral import best_block
from edgecompress.layers import Layer, Skip
from edgecompress.model import Model, model_digest
from edgecompress.operands import has_weight
from edgecompress.orientation import read_weight
from edgecompress.plan import Plan, budget_forms, make_plan, pruned_together, with_shares
from edgecompress.recipe import DEFAULT_KEEP, Recipe, Settings
from edgecompress.sparsity import shares_of_zeros

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.factorize.sizes import FormName
    from edgecompress.graph import Graph
    from edgecompress.model import Array
    from edgecompress.moments import Moments

    Progress = Callable[[int, int], None]


_LAST_ERROR = 0.1
"""``auto`` leaves a last layer whole that would lose more of its output. Of the layers before it the best form of half
the parameters loses 0.01 to 0.05, and the next layers make up for some of that; of the logits of small classifiers it
loses 0.16 (MNIST MLP) to 0.51 (digits): few classes need all their ranks."""


def decide(
    recipe: Recipe,
    source: Model,
    graph: Graph,
    entries: Sequence[Layer | Skip],
    *,
    moments: Mapping[str, Moments],
    data: DataSet | None,
    shrink: Mapping[str, int],
    progress: Progress | None = None,
) -> Plan:
    """Return the plan of a recipe for ``source``, whose prepared ``graph`` has the layers ``entries``.

    Raises:
        RecipeError: a budget without a form that could be chosen.
        BudgetError, ModelError, DataError: see ``allocate_ranks``.
    """

    def choose(layer: Layer, settings: Settings) -> tuple[FormName, tuple[int, ...]] | str:
        return _choose(graph, layer, settings, moments.get(layer.name))

    allocation = None
    if recipe.allocate:
        forms = budget_forms(recipe, entries, opset=source.opset)
        if not forms:
            raise RecipeError("allocate: no layer shares the budget", hint="add --factorize separable or another form")
        if recipe.budget_unit == "macs" and all(each == ("spectral",) for each in forms.values()):
            raise RecipeError(
                "budget_unit is macs, multiply-accumulates, of which spectral saves none: its weight multiplies whole",
                hint="set budget_unit to parameters, or choose another form",
            )
        allocation = allocate_ranks(
            graph.model,
            graph,
            [entry for entry in entries if isinstance(entry, Layer) and entry.name in forms],
            forms,
            moments=moments,
            data=data,
            keep=DEFAULT_KEEP if recipe.everywhere.keep is None else recipe.everywhere.keep,
            unit=cast("Unit", recipe.budget_unit),
            progress=progress,
        )
    plan = make_plan(
        recipe,
        entries,
        model_sha256=model_digest(source),
        calibrated=bool(moments),
        choose=choose,
        allocation=allocation,
        shrink=shrink,
        opset=source.opset,
    )
    layers, share = pruned_together(recipe, plan, entries), recipe.everywhere.prune
    if not layers or share is None:
        return plan
    return with_shares(plan, shares_of_zeros(graph, layers, share, moments=moments, data=data, progress=progress))


def _choose(
    graph: Graph, layer: Layer, settings: Settings, moments: Moments | None
) -> tuple[FormName, tuple[int, ...]] | str:
    """Return the form and ranks that the values of a layer ask for, or why there are none."""
    weight = read_weight(graph, layer)
    keep = DEFAULT_KEEP if settings.keep is None else settings.keep
    if settings.factorize == "auto":
        return _best(layer, weight, keep, moments)
    if settings.factorize == "spectral":
        full = moments.second_moment[0] if moments is not None and moments.is_full else None
        return "spectral", best_block(weight, keep, full)
    form = cast("FormName", settings.factorize)
    ranks = ranks_by_value(form, weight, energy=settings.energy, groups=layer.groups)
    return "EVBMF finds no rank" if ranks is None else (form, ranks)


def _best(layer: Layer, weight: Array, keep: float, moments: Moments | None) -> tuple[FormName, tuple[int, ...]] | str:
    """Return the form that ``auto`` takes, or why it takes none."""
    found = best_form(weight, keep, moments, groups=layer.groups)
    if found is None:
        return "no form of this size is smaller"
    form, ranks, error = found
    if error <= _LAST_ERROR or not _is_last(layer):
        return form, ranks
    rank = " x ".join(map(str, ranks))
    return f"{form} rank {rank} would lose {error:.0%} of the output, which no layer behind this one makes up for"


def _is_last(layer: Layer) -> bool:
    """Tell whether no node with a weight comes behind a layer, on any way to the outputs."""
    waiting = [tensor for node in layer.nodes for tensor in node.outputs]
    seen = {tensor.name for tensor in waiting}
    while waiting:
        for node in waiting.pop().outputs:
            if has_weight(node):
                return False
            waiting += [tensor for tensor in node.outputs if tensor.name not in seen]
            seen.update(tensor.name for tensor in node.outputs)
    return True
