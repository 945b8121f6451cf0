"""The decision: exactly what each layer gets. Readable, editable, re-appliable JSON."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, cast

from edgecompress.factorize.rank import aligned_ranks, ranks_for_share
from edgecompress.factorize.sizes import FormName, count_parameters, dense_parameters
from edgecompress.factorize.solve import AUTO_FORMS, allowed_ranks
from edgecompress.layers import Layer, Skip
from edgecompress.model import MAX_OPSET
from edgecompress.orientation import group_shape, why_not
from edgecompress.recipe import DEFAULT_KEEP, Recipe, Settings, names_layer, resolve, sizes_in

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA_VERSION = 1
_TINY_SHARE = 0.005
_GRID_BITS = 3  # of a code, more than most steps leave
TOO_FEW = "values are too few for"
"""In the reason of a layer whose values would not get smaller as indices or codes."""

_CODEBOOK_OVERHEAD_BYTES = 160  # two nodes, two tensors, an entry in the container


@dataclass(frozen=True, kw_only=True)
class FactorizePlan:
    """``scheme`` is a form; ``rank`` its rank, for ``tucker2`` the two (out, in); ``calibrated`` asks for data."""

    scheme: FormName
    rank: int | tuple[int, int]
    calibrated: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks as the solvers take them."""
        return self.rank if isinstance(self.rank, tuple) else (self.rank,)


@dataclass(frozen=True, kw_only=True)
class WeightsPlan:
    """``scheme`` is ``kmeans`` with ``2 ** bits`` clusters, or ``grid``.

    ``step`` is that of a grid, in units of the values' root mean square; ``prune`` is the share of the values that
    become zero; ``calibrated``: by the error of the layer's output.
    """

    scheme: str
    bits: int | None
    step: float | None
    prune: float
    calibrated: bool


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one layer gets. ``reason`` says why a stage leaves it alone, where one does."""

    layer: str
    factorize: FactorizePlan | None
    weights: WeightsPlan | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plans of all layers, in graph order, for the model with this SHA-256.

    ``shrink`` says how many outputs some layers keep; the others of the plan are decided for what is left then.
    ``quantize`` = ``int8`` runs what can be in 8 bits.
    """

    schema_version: int
    model_sha256: str
    shrink: Mapping[str, int] = field(default_factory=dict)
    quantize: str = "none"
    layers: tuple[LayerPlan, ...]


_Decided = tuple[FactorizePlan | None, str | None]

Chooser = Callable[[Layer, Settings], tuple[FormName, tuple[int, ...]] | str]
"""Decides what depends on a layer's values: the form for ``auto``, the rank for ``energy`` and ``evbmf``; or says why
there is none."""

Allocation = Mapping[str, tuple[FormName, tuple[int, ...]] | None]
"""What each of the layers that share a budget gets; ``None`` leaves it as it is."""


def make_plan(
    recipe: Recipe,
    entries: Sequence[Layer | Skip],
    *,
    model_sha256: str,
    calibrated: bool,
    choose: Chooser | None = None,
    allocation: Allocation | None = None,
    shrink: Mapping[str, int] | None = None,
    opset: int = MAX_OPSET,
) -> Plan:
    """Decide for every layer; ``calibrated`` says that there will be moments of those layers that take them.

    A convolution that comes first sees the raw input and does not forgive; a layer with hardly any of the parameters
    and of the work gains nothing and may be the classifier: neither is factorized unless the recipe names it.
    ``choose`` is asked where the values of a layer decide; ``allocation`` has decided for the layers of
    ``budget_forms``; ``shrink`` is what was done before. ``opset`` is the model's: older ones cannot have every form.
    """
    reserved = _reserved(recipe, entries)
    shared = allocation or {}
    plans: list[LayerPlan] = []
    for entry in entries:
        if isinstance(entry, Skip):
            plans.append(untouched(entry.name, entry.reason))
            continue
        settings, with_moments = resolve(recipe, entry), calibrated and entry.takes_moments
        decided: _Decided
        if entry.name in shared:
            decided = _from_budget(shared[entry.name], with_moments)
        elif entry.name in reserved and settings.factorize != "none" and entry.fixed_form is None:
            decided = None, reserved[entry.name]
        else:
            decided = _factorize_plan(entry, settings, with_moments, choose=choose, opset=opset)
        if settings.rank is None:
            decided = _align(entry, decided, recipe.rank_alignment)
        plans.append(_layer_plan(entry, settings, with_moments, decided))
    return Plan(
        schema_version=SCHEMA_VERSION,
        model_sha256=model_sha256,
        shrink=dict(shrink or {}),
        quantize=recipe.quantize,
        layers=tuple(plans),
    )


def budget_forms(
    recipe: Recipe, entries: Sequence[Layer | Skip], *, opset: int = MAX_OPSET
) -> dict[str, tuple[FormName, ...]]:
    """Return, by layer, the forms that it may take of all layers that share the budget of an ``allocate`` recipe.

    These are the layers that would be factorized, but for those for which the recipe has a size of their own.
    """
    reserved = _reserved(recipe, entries)
    found: dict[str, tuple[FormName, ...]] = {}
    for layer in entries:
        if isinstance(layer, Skip) or layer.name in reserved or _has_own_size(recipe, layer):
            continue
        scheme = resolve(recipe, layer).factorize
        if scheme in (None, "none"):
            continue
        named = AUTO_FORMS if scheme == "auto" else (cast("FormName", scheme),)
        forms = tuple(form for form in named if why_not(form, layer, opset) is None)
        if forms:
            found[layer.name] = forms
    return found


def _has_own_size(recipe: Recipe, layer: Layer) -> bool:
    return any(sizes_in(entry) for entry in _own_levels(recipe, layer))


def _own_levels(recipe: Recipe, layer: Layer) -> list[Settings]:
    """Return the settings that a recipe has for this layer or its operator."""
    levels = [entry for name, entry in recipe.layers.items() if fnmatch.fnmatchcase(layer.name, name)]
    own = recipe.layers.get(layer.name), recipe.ops.get(layer.op)
    return [*levels, *(entry for entry in own if entry is not None)]


def pruned_together(recipe: Recipe, plan: Plan, entries: Sequence[Layer | Skip]) -> list[Layer]:
    """Return the layers that share the zeros of a recipe's ``prune``.

    Not those for which it has a share of their own, nor the factorized ones: their factors have that share each.
    """
    if recipe.prune_scope != "global" or recipe.everywhere.prune is None:
        return []
    whole = {entry.layer for entry in plan.layers if entry.weights is not None and entry.factorize is None}
    return [
        layer
        for layer in entries
        if isinstance(layer, Layer)
        and layer.name in whole
        and all(entry.prune is None for entry in _own_levels(recipe, layer))
    ]


def with_shares(plan: Plan, shares: Mapping[str, float]) -> Plan:
    """Return the plan with these shares of the weights of some layers zero."""
    layers = []
    for entry in plan.layers:
        weights = entry.weights
        if weights is not None and entry.layer in shares:
            weights = replace(weights, prune=shares[entry.layer])
        layers.append(replace(entry, weights=weights))
    return replace(plan, layers=tuple(layers))


def _from_budget(given: tuple[FormName, tuple[int, ...]] | None, calibrated: bool) -> _Decided:
    if given is None:
        return None, "the budget does more for the output when this layer stays whole"
    scheme, ranks = given
    return FactorizePlan(scheme=scheme, rank=plain(ranks), calibrated=calibrated), None


def _reserved(recipe: Recipe, entries: Sequence[Layer | Skip]) -> dict[str, str]:
    """Return why each layer is not factorized that only a recipe which names it factorizes."""
    layers = [entry for entry in entries if isinstance(entry, Layer)]
    first = layers[0].name if layers else None
    total, work = sum(layer.parameters for layer in layers), sum(layer.macs or 0 for layer in layers)
    reasons = {layer.name: _why_reserved(layer, first, total, work) for layer in layers}
    return {name: why for name, why in reasons.items() if why is not None and not names_layer(recipe, name)}


def _why_reserved(layer: Layer, first: str | None, total: int, work: int) -> str | None:
    """Say why a layer is not factorized unless it is named."""
    if layer.name == first and layer.op == "Conv":
        return "the first convolution is factorized only where a recipe names it"
    if layer.parameters < _TINY_SHARE * total and (layer.macs or 0) <= _TINY_SHARE * work:
        return f"{layer.parameters} of {total} parameters are too few to gain by factors"
    return None


def _layer_plan(layer: Layer, settings: Settings, calibrated: bool, decided: _Decided) -> LayerPlan:
    factorize, reason = decided
    weights: WeightsPlan | None = None
    if settings.cluster in ("kmeans", "grid"):
        weights = WeightsPlan(
            scheme=settings.cluster,
            bits=settings.bits,
            step=settings.step,
            prune=settings.prune or 0.0,
            calibrated=calibrated,
        )
        if not pays_off(weights, layer.parameters, layer.constant.dtype.itemsize):
            what = "a grid" if settings.bits is None else f"a codebook of {2**settings.bits}"
            small = f"{layer.parameters} {TOO_FEW} {what}"
            weights, reason = None, f"{reason}; {small}" if reason else small
    if reason is None and factorize is None and weights is None:
        reason = "not asked for"
    return LayerPlan(layer=layer.name, factorize=factorize, weights=weights, reason=reason)


def _factorize_plan(
    layer: Layer, settings: Settings, calibrated: bool, *, choose: Chooser | None, opset: int
) -> _Decided:
    if settings.factorize in (None, "none"):
        return None, None
    if layer.fixed_form is not None:
        return None, layer.fixed_form
    hindrance = None if settings.factorize == "auto" else why_not(cast("FormName", settings.factorize), layer, opset)
    if hindrance is not None:
        return None, hindrance
    if choose is not None and _depends_on_values(settings):
        chosen = choose(layer, settings)
        if isinstance(chosen, str):
            return None, chosen
        scheme, ranks = chosen
    else:
        scheme = cast("FormName", settings.factorize)
        ranks = _ranks(scheme, layer, settings)
    # a rank that was asked for counts as it is, not as what the shape cuts it down to
    judged = (settings.rank,) if settings.rank is not None and len(ranks) == 1 else ranks
    if not is_smaller(layer, scheme, judged):
        return None, no_gain(layer, judged)
    return FactorizePlan(scheme=scheme, rank=plain(ranks), calibrated=calibrated), None


def _align(layer: Layer, decided: _Decided, multiple: int) -> _Decided:
    plan, reason = decided
    if plan is None:
        return decided
    ranks = aligned_ranks(plan.scheme, group_shape(layer), plan.ranks, multiple)
    return replace(plan, rank=plain(ranks)), reason


def _depends_on_values(settings: Settings) -> bool:
    if settings.factorize == "spectral" and settings.rank is None:
        return True
    return settings.factorize == "auto" or settings.energy is not None or bool(settings.evbmf)


def _ranks(scheme: FormName, layer: Layer, settings: Settings) -> tuple[int, ...]:
    if settings.rank is not None:
        return allowed_ranks(scheme, group_shape(layer), settings.rank)
    return ranks_for_share(scheme, group_shape(layer), DEFAULT_KEEP if settings.keep is None else settings.keep)


def plain(ranks: tuple[int, ...]) -> int | tuple[int, int]:
    """Return ranks as a plan has them: one as a number."""
    return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])


def is_smaller(layer: Layer, scheme: FormName, ranks: tuple[int, ...]) -> bool:
    """Tell whether a form has fewer parameters than what it takes the place of."""
    shape = group_shape(layer)
    return count_parameters(scheme, shape, ranks) < dense_parameters(scheme, shape)


def no_gain(layer: Layer, ranks: tuple[int, ...]) -> str:
    """Say why ranks that save nothing are not used."""
    return f"rank {' x '.join(map(str, ranks))} would not lower its {layer.parameters} parameters"


def pays_off(weights: WeightsPlan, count: int, item_bytes: int) -> bool:
    """Tell whether ``count`` values are smaller as indices and a codebook, or codes and a step, than as they are."""
    bits, values = (_GRID_BITS, 1) if weights.bits is None else (weights.bits, 2**weights.bits)
    return bool(count * bits / 8 + values * item_bytes + _CODEBOOK_OVERHEAD_BYTES < count * item_bytes)


def plan_to_json(plan: Plan) -> str:
    """Return the plan as JSON, one key a line."""
    return json.dumps(asdict(plan), indent=2, ensure_ascii=False) + "\n"


def untouched(name: str, reason: str) -> LayerPlan:
    """Return the plan of a layer that every stage leaves alone."""
    return LayerPlan(layer=name, factorize=None, weights=None, reason=reason)
