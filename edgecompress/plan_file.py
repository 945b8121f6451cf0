"""Read a plan back from JSON, which may have been edited: what does not fit the model is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from edgecompress.errors import RecipeError, did_you_mean
from edgecompress.factorize.rank import max_ranks
from edgecompress.factorize.solve import FORM_NAMES
from edgecompress.layers import Layer, Skip
from edgecompress.model import MAX_OPSET
from edgecompress.orientation import group_shape, why_not
from edgecompress.plan import (
    SCHEMA_VERSION,
    FactorizePlan,
    LayerPlan,
    Plan,
    WeightsPlan,
    is_smaller,
    no_gain,
    plain,
    untouched,
)
from edgecompress.recipe import CLUSTER_SCHEMES, LARGEST_STEP, QUANTIZE_SCHEMES

if TYPE_CHECKING:
    from pathlib import Path

    from edgecompress.factorize.sizes import FormName

_MOST_UNITS = 1 << 31
_START_AGAIN = "start again from the plan.json of an earlier compress"


@dataclass(frozen=True)
class PlanFile:
    """A plan as it was read, its layers not looked at yet: those of a model that shrinks are known only then."""

    path: Path
    model_sha256: str
    shrink: Mapping[str, int]
    quantize: str
    layers: Sequence[Any]


def read_plan(path: Path, *, model_sha256: str) -> PlanFile:
    """Read a plan, which may have been edited. Raises ``RecipeError``: malformed, or made for another model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not JSON: {error}", hint=_START_AGAIN) from error
    content = _object(content, ("schema_version", "model_sha256", "shrink", "quantize", "layers"), str(path))
    version = content["schema_version"]
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise RecipeError(f"{path}: schema_version {version!r} is not {SCHEMA_VERSION}", hint="make it again")
    if content["model_sha256"] != model_sha256:
        raise RecipeError(f"{path}: the plan was made for another model", hint="use the plan of this very model file")
    if not isinstance(content["layers"], list):
        raise RecipeError(f"{path}: layers must be a list", hint=_START_AGAIN)
    if not isinstance(content["shrink"], dict | None):
        raise RecipeError(f"{path}: shrink must be an object of layers and counts", hint=_START_AGAIN)
    shrink = (content["shrink"] or {}).items()
    counts = {name: _whole(count, _MOST_UNITS, f"{path}: shrink: {name!r}") for name, count in shrink}
    quantize = "none" if content["quantize"] is None else content["quantize"]
    if quantize not in QUANTIZE_SCHEMES:
        raise RecipeError(
            f"{path}: quantize must be one of {', '.join(QUANTIZE_SCHEMES)}, not {quantize!r}", hint="correct the value"
        )
    return PlanFile(path, model_sha256, counts, quantize, content["layers"])


def check_plan(file: PlanFile, entries: Sequence[Layer | Skip], *, opset: int = MAX_OPSET) -> Plan:
    """Return the plan of a file for a model with these layers.

    Raises ``RecipeError``: it names a layer that is unknown or there twice, or asks for what a layer cannot have.
    """
    where, path = str(file.path), file.path
    known = {entry.name: entry for entry in entries}
    given: dict[str, LayerPlan] = {}
    for item in file.layers:
        entry = _object(item, ("layer", "factorize", "weights", "reason"), where)
        name = entry["layer"]
        if not isinstance(name, str) or name not in known:
            raise RecipeError(f"{path}: the model has no layer {name!r}", hint=did_you_mean(str(name), known))
        if name in given:
            raise RecipeError(f"{path}: layer {name!r} is there twice", hint="remove one of the two")
        given[name] = _read_layer(entry, known[name], f"{where}: layer {name!r}", opset)
    layers = tuple(given.get(name) or untouched(name, "not in the plan") for name in known)
    return Plan(
        schema_version=SCHEMA_VERSION,
        model_sha256=file.model_sha256,
        layers=layers,
        shrink=dict(file.shrink),
        quantize=file.quantize,
    )


def _object(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """Return ``value`` as an object with exactly ``keys``; what may be missing of them is ``None`` then."""
    if not isinstance(value, dict):
        found = f"{where}: expected an object with {', '.join(keys)}, found {value!r}"
        raise RecipeError(found[:200], hint=_START_AGAIN)
    for key in value:
        if key not in keys:
            raise RecipeError(f"{where}: unknown key {key!r}", hint=did_you_mean(key, keys))
    missing = [key for key in keys if key not in value and key not in ("reason", "shrink", "quantize")]
    if missing:
        raise RecipeError(f"{where}: missing {', '.join(missing)}", hint="add it, null where it does not apply")
    return {key: value.get(key) for key in keys}


def _read_layer(entry: Mapping[str, Any], layer: Layer | Skip, where: str, opset: int) -> LayerPlan:
    reason = entry["reason"]
    if not isinstance(reason, str | None):
        raise RecipeError(f"{where}: reason must be text or null, not {reason!r}", hint="correct the value")
    if isinstance(layer, Skip):
        if entry["factorize"] is not None or entry["weights"] is not None:
            raise RecipeError(f"{where} cannot be compressed: {layer.reason}", hint="set factorize and weights to null")
        return untouched(layer.name, layer.reason)
    factorize = _read_factorize(entry["factorize"], layer, f"{where}: factorize", opset)
    if factorize is not None and not is_smaller(layer, factorize.scheme, factorize.ranks):
        reason = no_gain(layer, factorize.ranks)
        factorize = None
    weights = _read_weights(entry["weights"], layer, f"{where}: weights")
    if factorize is None and weights is None and reason is None:
        reason = "the plan leaves it alone"
    return LayerPlan(layer=layer.name, factorize=factorize, weights=weights, reason=reason)


def _read_factorize(value: Any, layer: Layer, where: str, opset: int) -> FactorizePlan | None:
    if value is None:
        return None
    if layer.fixed_form is not None:
        raise RecipeError(f"{where} cannot be done: {layer.fixed_form}", hint="set factorize to null")
    asked = _object(value, ("scheme", "rank", "calibrated"), where)
    scheme = cast("FormName", _scheme(asked["scheme"], FORM_NAMES, where))
    hindrance = why_not(scheme, layer, opset)
    if hindrance is not None:
        raise RecipeError(
            f"{where} cannot be done: {hindrance}", hint="choose another scheme, or set factorize to null"
        )
    return FactorizePlan(
        scheme=scheme,
        rank=_read_rank(asked["rank"], max_ranks(scheme, group_shape(layer)), f"{where}: rank"),
        calibrated=_calibrated(asked["calibrated"], layer, where),
    )


def _read_rank(value: Any, limits: tuple[int, ...], where: str) -> int | tuple[int, int]:
    if len(limits) == 1:
        return _whole(value, limits[0], where)
    if not isinstance(value, list) or len(value) != len(limits):
        raise RecipeError(
            f"{where} must be a list of {len(limits)} whole numbers, not {value!r}", hint="correct the value"
        )
    return plain(tuple(_whole(rank, limit, where) for rank, limit in zip(value, limits, strict=True)))


def _read_weights(value: Any, layer: Layer, where: str) -> WeightsPlan | None:
    if value is None:
        return None
    asked = _object(value, ("scheme", "bits", "step", "prune", "calibrated"), where)
    scheme = _scheme(asked["scheme"], CLUSTER_SCHEMES, where)
    size, other = ("bits", "step") if scheme == "kmeans" else ("step", "bits")
    if asked[other] is not None:
        raise RecipeError(f"{where}: {scheme} has {size}, not {other}", hint=f"set {other} to null")
    return WeightsPlan(
        scheme=scheme,
        bits=_whole(asked["bits"], 8, f"{where}: bits") if scheme == "kmeans" else None,
        step=_number(asked["step"], f"{where}: step", least=0.0, most=LARGEST_STEP) if scheme == "grid" else None,
        prune=_number(asked["prune"], f"{where}: prune", least=-1.0, most=1.0),
        calibrated=_calibrated(asked["calibrated"], layer, where),
    )


def _number(value: Any, where: str, *, least: float, most: float) -> float:
    """Return a number above ``least`` and below ``most``; above -1 stands for 0 or more."""
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not least < value < most or (least < 0.0 and value < 0.0):
        allowed = "a share of 0 or more, below 1" if least < 0.0 else f"a number above 0, below {most:g}"
        raise RecipeError(f"{where} must be {allowed}, not {value!r}", hint="correct the value")
    return float(value)


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
