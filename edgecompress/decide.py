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
from edgecompress.orientation import read_weight
from edgecompress.plan import Plan, budget_forms, make_plan
from edgecompress.recipe import DEFAULT_KEEP, Recipe, Settings

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.factorize.sizes import FormName
    from edgecompress.graph import Graph
    from edgecompress.moments import Moments

    Progress = Callable[[int, int], None]


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

    def choose(layer: Layer, settings: Settings) -> tuple[FormName, tuple[int, ...]] | None:
        return _choose(graph, layer, settings, moments.get(layer.name))

    allocation = None
    if recipe.allocate:
        forms = budget_forms(recipe, entries, opset=source.opset)
        if not forms:
            raise RecipeError("allocate: no layer shares the budget", hint="add --factorize separable or another form")
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
    return make_plan(
        recipe,
        entries,
        model_sha256=model_digest(source),
        calibrated=bool(moments),
        choose=choose,
        allocation=allocation,
        shrink=shrink,
        opset=source.opset,
    )


def _choose(
    graph: Graph, layer: Layer, settings: Settings, moments: Moments | None
) -> tuple[FormName, tuple[int, ...]] | None:
    """Return the form and ranks that the values of a layer ask for, ``None`` where no rank is found."""
    weight = read_weight(graph, layer)
    keep = DEFAULT_KEEP if settings.keep is None else settings.keep
    if settings.factorize == "auto":
        return best_form(weight, keep, moments, groups=layer.groups)
    if settings.factorize == "spectral":
        full = moments.second_moment[0] if moments is not None and moments.is_full else None
        return "spectral", best_block(weight, keep, full)
    form = cast("FormName", settings.factorize)
    ranks = ranks_by_value(form, weight, energy=settings.energy, groups=layer.groups)
    return None if ranks is None else (form, ranks)
