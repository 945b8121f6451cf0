"""The decision: exactly what each layer gets. Readable, editable, re-appliable JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgecompress.errors import RecipeError, did_you_mean
from edgecompress.factorize.forms import low_rank_parameters, rank_for_share
from edgecompress.layers import Layer, Skip
from edgecompress.recipe import CLUSTER_SCHEMES, FACTORIZE_SCHEMES, Recipe, Settings, resolve

SCHEMA_VERSION = 1
_CODEBOOK_OVERHEAD_BYTES = 160  # two nodes, two tensors, an entry in the container



@dataclass(frozen=True, kw_only=True)
class FactorizePlan:
    """``scheme`` is ``svd``; ``rank`` lies in 1 .. min(C_out, C_in * prod(kernel)); ``calibrated`` asks for data."""

    scheme: str
    rank: int
    calibrated: bool


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


def make_plan(recipe: Recipe, entries: Sequence[Layer | Skip], *, model_sha256: str, calibrated: bool) -> Plan:
    """Decide for every layer; ``calibrated`` says that moments will be there."""
    plans = tuple(
        LayerPlan(layer=entry.name, factorize=None, weights=None, reason=entry.reason)
        if isinstance(entry, Skip)
        else _layer_plan(entry, resolve(recipe, entry), calibrated)
        for entry in entries
    )
    return Plan(schema_version=SCHEMA_VERSION, model_sha256=model_sha256, layers=plans)


def _layer_plan(layer: Layer, settings: Settings, calibrated: bool) -> LayerPlan:
    factorize, reason = _factorize_plan(layer, settings, calibrated)
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


def _factorize_plan(layer: Layer, settings: Settings, calibrated: bool) -> tuple[FactorizePlan | None, str | None]:
    if settings.factorize == "none":
        return None, None
    if layer.fixed_form is not None:
        return None, layer.fixed_form
    rank = settings.rank if settings.rank is not None else rank_for_share(layer.shape, settings.keep or 1.0)
    if low_rank_parameters(layer.shape, rank) >= layer.parameters:
        return None, f"rank {rank} would not lower its {layer.parameters} parameters"
    return FactorizePlan(scheme="svd", rank=rank, calibrated=calibrated), None


def pays_off(count: int, item_bytes: int, bits: int) -> bool:
    """Tell whether ``count`` values are smaller as indices of ``bits`` and a codebook than as they are."""
    return count * bits / 8 + 2**bits * item_bytes + _CODEBOOK_OVERHEAD_BYTES < count * item_bytes


def plan_to_json(plan: Plan) -> str:
    """Return the plan as JSON, one key a line."""
    return json.dumps(asdict(plan), indent=2, ensure_ascii=False) + "\n"


def read_plan(path: Path, *, model_sha256: str, entries: Sequence[Layer | Skip]) -> Plan:
    """Read a plan, which may have been edited, and check that it fits the model.

    Raises ``RecipeError``: malformed, made for another model, names an unknown layer, or asks for what a layer cannot have.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise RecipeError(f"{path}: not JSON: {error}", hint="start again from the plan.json of an earlier compress") from error
    where = str(path)
    content = _object(content, ("schema_version", "model_sha256", "layers"), where)
    if content["schema_version"] != SCHEMA_VERSION:
        raise RecipeError(f"{path}: schema_version {content['schema_version']!r} is not {SCHEMA_VERSION}", hint="make it again")
    if content["model_sha256"] != model_sha256:
        raise RecipeError(f"{path}: the plan was made for another model", hint="use the plan of this very model file")
    if not isinstance(content["layers"], list):
        raise RecipeError(f"{path}: layers must be a list", hint="start again from an unedited plan")
    known = {entry.name: entry for entry in entries}
    given: dict[str, LayerPlan] = {}
    for item in content["layers"]:
        entry = _object(item, ("layer", "factorize", "weights", "reason"), where)
        name = entry["layer"]
        if name not in known:
            raise RecipeError(f"{path}: the model has no layer {name!r}", hint=did_you_mean(str(name), known))
        given[name] = _read_layer(entry, known[name], f"{where}: layer {name!r}")
    absent = "not in the plan"
    return Plan(
        schema_version=SCHEMA_VERSION,
        model_sha256=model_sha256,
        layers=tuple(
            given.get(name, LayerPlan(layer=name, factorize=None, weights=None, reason=absent)) for name in known
        ),
    )


def _object(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """Return ``value`` as an object with exactly ``keys``; a missing ``reason`` is ``None``."""
    if not isinstance(value, dict):
        raise RecipeError(f"{where}: expected an object with {', '.join(keys)}, found {value!r}"[:200], hint="start again from an unedited plan")
    for key in value:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key {key!r}", hint=did_you_mean(key, keys))
    missing = [key for key in keys if key not in value and key != "reason"]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}", hint="add it, null where it does not apply")
    return {key: value.get(key) for key in keys}


def _read_layer(entry: Mapping[str, Any], layer: Layer | Skip, where: str) -> LayerPlan:
    reason = entry["reason"]
    if isinstance(layer, Skip):
        if entry["factorize"] is not None or entry["weights"] is not None:
            raise RecipeError(f"{where} cannot be compressed: {layer.reason}", hint="set factorize and weights to null")
        return LayerPlan(layer=layer.name, factorize=None, weights=None, reason=layer.reason)
    factorize = weights = None
    if entry["factorize"] is not None:
        asked = _object(entry["factorize"], ("scheme", "rank", "calibrated"), f"{where}: factorize")
        _member(asked["scheme"], FACTORIZE_SCHEMES[1:], f"{where}: scheme")
        rank, calibrated = asked["rank"], _flag(asked["calibrated"], where)
        most = min(layer.shape[0], layer.parameters // layer.shape[0])
        if layer.fixed_form is not None:
            raise RecipeError(f"{where} cannot be factorized: {layer.fixed_form}", hint="set factorize to null")
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise RecipeError(f"{where}: rank must be a whole number from 1 to {most}, not {rank!r}", hint="correct the rank")
        if low_rank_parameters(layer.shape, rank) >= layer.parameters:
            reason = f"rank {rank} would not lower its {layer.parameters} parameters"
        else:
            factorize = FactorizePlan(scheme=asked["scheme"], rank=rank, calibrated=calibrated)
    if entry["weights"] is not None:
        asked = _object(entry["weights"], ("scheme", "bits", "calibrated"), f"{where}: weights")
        _member(asked["scheme"], CLUSTER_SCHEMES[1:], f"{where}: scheme")
        bits, calibrated = asked["bits"], _flag(asked["calibrated"], where)
        if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
            raise RecipeError(f"{where}: bits must be a whole number from 1 to 8, not {bits!r}", hint="correct the bits")
        weights = WeightsPlan(scheme=asked["scheme"], bits=bits, calibrated=calibrated)
    return LayerPlan(layer=layer.name, factorize=factorize, weights=weights, reason=reason)


def _member(value: Any, allowed: Sequence[str], where: str) -> None:
    if value not in allowed:
        raise RecipeError(f"{where} must be one of {', '.join(allowed)}, not {value!r}", hint="correct the scheme")


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: calibrated must be true or false, not {value!r}", hint="correct the value")
    return value
