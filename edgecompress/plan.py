"""The decision: exactly what each layer gets. Readable, editable, re-appliable JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from edgecompress.errors import RecipeError, did_you_mean
from edgecompress.factorize.rank import max_ranks, ranks_for_share
from edgecompress.factorize.sizes import FormName, count_parameters, fits
from edgecompress.factorize.solve import FORM_NAMES, allowed_ranks
from edgecompress.layers import Layer, Skip
from edgecompress.recipe import CLUSTER_SCHEMES, DEFAULT_KEEP, Recipe, Settings, names_layer, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

SCHEMA_VERSION = 1
_START_AGAIN = "start again from the plan.json of an earlier compress"
_TINY_SHARE = 0.005
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
    """``scheme`` is ``kmeans`` with ``2 ** bits`` clusters; ``calibrated`` weighs errors by the inputs' mean square."""

    scheme: str
    bits: int
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
    """The plans of all layers, in graph order, for the model with this SHA-256."""

    schema_version: int
    model_sha256: str
    layers: tuple[LayerPlan, ...]


Chooser = Callable[[Layer, Settings], tuple[FormName, tuple[int, ...]] | None]
"""Decides what depends on a layer's values: the form for ``auto``, the rank for ``energy`` and ``evbmf``."""


def make_plan(
    recipe: Recipe,
    entries: Sequence[Layer | Skip],
    *,
    model_sha256: str,
    calibrated: bool,
    choose: Chooser | None = None,
) -> Plan:
    """Decide for every layer; ``calibrated`` says that there will be moments of those layers that take them.

    A convolution that comes first sees the raw input and does not forgive; a layer with hardly any of the parameters
    gains nothing and may be the classifier: neither is factorized unless the recipe names it. ``choose`` is asked
    where the values of a layer decide.
    """
    first = next((entry.name for entry in entries if isinstance(entry, Layer)), None)
    total = sum(entry.parameters for entry in entries if isinstance(entry, Layer))
    plans: list[LayerPlan] = []
    for entry in entries:
        if isinstance(entry, Skip):
            plans.append(_untouched(entry.name, entry.reason))
            continue
        settings, with_moments = resolve(recipe, entry), calibrated and entry.takes_moments
        reserved = None if names_layer(recipe, entry.name) else _why_reserved(entry, first, total)
        if reserved is not None and settings.factorize != "none" and entry.fixed_form is None:
            decided: tuple[FactorizePlan | None, str | None] = (None, reserved)
        else:
            decided = _factorize_plan(entry, settings, with_moments, choose)
        plans.append(_layer_plan(entry, settings, with_moments, decided))
    return Plan(schema_version=SCHEMA_VERSION, model_sha256=model_sha256, layers=tuple(plans))


def _why_reserved(layer: Layer, first: str | None, total: int) -> str | None:
    """Say why a layer is not factorized unless it is named."""
    if layer.name == first and layer.op == "Conv":
        return "the first convolution is factorized only where a recipe names it"
    if layer.parameters < _TINY_SHARE * total:
        return f"{layer.parameters} of {total} parameters are too few to gain by factors"
    return None


def _layer_plan(
    layer: Layer, settings: Settings, calibrated: bool, decided: tuple[FactorizePlan | None, str | None]
) -> LayerPlan:
    factorize, reason = decided
    weights: WeightsPlan | None = None
    if settings.cluster == "kmeans":
        assert settings.bits is not None
        if pays_off(layer.parameters, layer.constant.dtype.itemsize, settings.bits):
            weights = WeightsPlan(scheme="kmeans", bits=settings.bits, calibrated=calibrated)
        else:
            small = f"{layer.parameters} values are too few for a codebook of {2**settings.bits}"
            reason = f"{reason}; {small}" if reason else small
    if reason is None and factorize is None and weights is None:
        reason = "not asked for"
    return LayerPlan(layer=layer.name, factorize=factorize, weights=weights, reason=reason)


def _factorize_plan(
    layer: Layer, settings: Settings, calibrated: bool, choose: Chooser | None
) -> tuple[FactorizePlan | None, str | None]:
    if settings.factorize in (None, "none"):
        return None, None
    if layer.fixed_form is not None:
        return None, layer.fixed_form
    if settings.factorize == "auto" or settings.energy is not None or settings.evbmf:
        chosen = choose(layer, settings) if choose is not None else None
        if chosen is None:
            return None, "no form of this size is smaller" if settings.factorize == "auto" else "EVBMF finds no rank"
        scheme, ranks = chosen
    else:
        scheme = cast("FormName", settings.factorize)
        if not fits(scheme, layer.shape):
            return None, f"{scheme} needs a kernel wider than 1, which this weight does not have"
        ranks = _ranks(scheme, layer, settings)
    # a rank that was asked for counts as it is, not as what the shape cuts it down to
    judged = (settings.rank,) if settings.rank is not None and len(ranks) == 1 else ranks
    if not _is_smaller(layer, scheme, judged):
        return None, _no_gain(layer, judged)
    return FactorizePlan(scheme=scheme, rank=_plain(ranks), calibrated=calibrated), None


def _ranks(scheme: FormName, layer: Layer, settings: Settings) -> tuple[int, ...]:
    if settings.rank is not None:
        return allowed_ranks(scheme, layer.shape, settings.rank)
    return ranks_for_share(scheme, layer.shape, DEFAULT_KEEP if settings.keep is None else settings.keep)


def _plain(ranks: tuple[int, ...]) -> int | tuple[int, int]:
    return ranks[0] if len(ranks) == 1 else (ranks[0], ranks[1])


def _is_smaller(layer: Layer, scheme: FormName, ranks: tuple[int, ...]) -> bool:
    return count_parameters(scheme, layer.shape, ranks) < layer.parameters


def _no_gain(layer: Layer, ranks: tuple[int, ...]) -> str:
    return f"rank {' x '.join(map(str, ranks))} would not lower its {layer.parameters} parameters"


def pays_off(count: int, item_bytes: int, bits: int) -> bool:
    """Tell whether ``count`` values are smaller as indices of ``bits`` and a codebook than as they are."""
    return bool(count * bits / 8 + 2**bits * item_bytes + _CODEBOOK_OVERHEAD_BYTES < count * item_bytes)


def plan_to_json(plan: Plan) -> str:
    """Return the plan as JSON, one key a line."""
    return json.dumps(asdict(plan), indent=2, ensure_ascii=False) + "\n"


def read_plan(path: Path, *, model_sha256: str, entries: Sequence[Layer | Skip]) -> Plan:
    """Read a plan, which may have been edited, and check that it fits the model.

    Raises ``RecipeError``: malformed, made for another model, names a layer that is unknown or there twice, or asks for
    what a layer cannot have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON: {error}", hint=_START_AGAIN) from error
    where = str(path)
    content = _object(content, ("schema_version", "model_sha256", "layers"), where)
    version = content["schema_version"]
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise RecipeError(f"{path}: schema_version {version!r} is not {SCHEMA_VERSION}", hint="make it again")
    if content["model_sha256"] != model_sha256:
        raise RecipeError(f"{path}: the plan was made for another model", hint="use the plan of this very model file")
    if not isinstance(content["layers"], list):
        raise RecipeError(f"{path}: layers must be a list", hint=_START_AGAIN)
    known = {entry.name: entry for entry in entries}
    given: dict[str, LayerPlan] = {}
    for item in content["layers"]:
        entry = _object(item, ("layer", "factorize", "weights", "reason"), where)
        name = entry["layer"]
        if not isinstance(name, str) or name not in known:
            raise RecipeError(f"{path}: the model has no layer {name!r}", hint=did_you_mean(str(name), known))
        if name in given:
            raise RecipeError(f"{path}: layer {name!r} is there twice", hint="remove one of the two")
        given[name] = _read_layer(entry, known[name], f"{where}: layer {name!r}")
    layers = (given.get(name) or _untouched(name, "not in the plan") for name in known)
    return Plan(schema_version=SCHEMA_VERSION, model_sha256=model_sha256, layers=tuple(layers))


def _untouched(name: str, reason: str) -> LayerPlan:
    return LayerPlan(layer=name, factorize=None, weights=None, reason=reason)


def _object(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """Return ``value`` as an object with exactly ``keys``; a missing ``reason`` is ``None``."""
    if not isinstance(value, dict):
        found = f"{where}: expected an object with {', '.join(keys)}, found {value!r}"
        raise RecipeError(found[:200], hint=_START_AGAIN)
    for key in value:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key {key!r}", hint=did_you_mean(key, keys))
    missing = [key for key in keys if key not in value and key != "reason"]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}", hint="add it, null where it does not apply")
    return {key: value.get(key) for key in keys}


def _read_layer(entry: Mapping[str, Any], layer: Layer | Skip, where: str) -> LayerPlan:
    reason = entry["reason"]
    if not isinstance(reason, str | None):
        raise RecipeError(f"{where}: reason must be text or null, not {reason!r}", hint="correct the value")
    if isinstance(layer, Skip):
        if entry["factorize"] is not None or entry["weights"] is not None:
            raise RecipeError(f"{where} cannot be compressed: {layer.reason}", hint="set factorize and weights to null")
        return _untouched(layer.name, layer.reason)
    factorize = _read_factorize(entry["factorize"], layer, f"{where}: factorize")
    if factorize is not None and not _is_smaller(layer, factorize.scheme, factorize.ranks):
        reason = _no_gain(layer, factorize.ranks)
        factorize = None
    weights = _read_weights(entry["weights"], layer, f"{where}: weights")
    if factorize is None and weights is None and reason is None:
        reason = "the plan leaves it alone"
    return LayerPlan(layer=layer.name, factorize=factorize, weights=weights, reason=reason)


def _read_factorize(value: Any, layer: Layer, where: str) -> FactorizePlan | None:
    if value is None:
        return None
    if layer.fixed_form is not None:
        raise RecipeError(f"{where} cannot be done: {layer.fixed_form}", hint="set factorize to null")
    asked = _object(value, ("scheme", "rank", "calibrated"), where)
    scheme = cast("FormName", _scheme(asked["scheme"], FORM_NAMES, where))
    if not fits(scheme, layer.shape):
        raise RecipeError(f"{where}: {scheme} needs a kernel wider than 1", hint="choose svd, or set factorize to null")
    return FactorizePlan(
        scheme=scheme,
        rank=_read_rank(asked["rank"], max_ranks(scheme, layer.shape), f"{where}: rank"),
        calibrated=_calibrated(asked["calibrated"], layer, where),
    )


def _read_rank(value: Any, limits: tuple[int, ...], where: str) -> int | tuple[int, int]:
    if len(limits) == 1:
        return _whole(value, limits[0], where)
    if not isinstance(value, list) or len(value) != len(limits):
        raise RecipeError(
            f"{where} must be a list of {len(limits)} whole numbers, not {value!r}", hint="correct the value"
        )
    return _plain(tuple(_whole(rank, limit, where) for rank, limit in zip(value, limits, strict=True)))


def _read_weights(value: Any, layer: Layer, where: str) -> WeightsPlan | None:
    if value is None:
        return None
    asked = _object(value, ("scheme", "bits", "calibrated"), where)
    return WeightsPlan(
        scheme=_scheme(asked["scheme"], CLUSTER_SCHEMES, where),
        bits=_whole(asked["bits"], 8, f"{where}: bits"),
        calibrated=_calibrated(asked["calibrated"], layer, where),
    )


def _scheme(value: Any, allowed: Sequence[str], where: str) -> str:
    """Return the name of a scheme; a stage is left out with ``null``, not with ``"none"``."""
    schemes = [scheme for scheme in allowed if scheme != "none"]
    if value not in schemes:
        raise RecipeError(
            f"{where}: scheme must be one of {', '.join(schemes)}, not {value!r}",
            hint="correct the scheme, or write null in place of the whole object",
        )
    return str(value)


def _whole(value: Any, most: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise RecipeError(f"{where} must be a whole number from 1 to {most}, not {value!r}", hint="correct the value")
    return value


def _calibrated(value: Any, layer: Layer, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: calibrated must be true or false, not {value!r}", hint="correct the value")
    if value and not layer.takes_moments:
        raise RecipeError(
            f"{where}: a {layer.op} layer such as this one is never calibrated", hint="set calibrated to false"
        )
    return value
