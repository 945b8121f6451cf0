"""What the user asks for: settings for all layers, for an operator type, for one layer. The more specific wins."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from edgecompress.errors import RecipeError, did_you_mean
from edgecompress.factorize.solve import FORM_NAMES
from edgecompress.operands import FACTORIZABLE_OPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgecompress.layers import Layer, Skip

FACTORIZE_SCHEMES = ("none", *FORM_NAMES, "auto")
CLUSTER_SCHEMES = ("none", "kmeans", "grid")
DEFAULT_KEEP = 0.5
DEFAULT_BITS = 5
DEFAULT_STEP = 1.0
LARGEST_STEP = 1000.0
_OPS = (*FACTORIZABLE_OPS, "ConvTranspose", "LSTM", "GRU", "Gather")
_SECTIONS = ("ops", "layers")
BUDGET_UNITS = ("parameters", "macs")
PRUNE_SCOPES = ("global", "layer")
_WHOLE_MODEL = (
    "shrink",
    "allocate",
    "budget_unit",
    "prune_scope",
    "average_bits",
    "target_size",
    "quantize",
    "rank_alignment",
)
QUANTIZE_SCHEMES = ("none", "int8")
_SIZES = ("rank", "keep", "energy", "evbmf")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to do with a layer; ``None`` leaves a setting to the less specific level.

    One of four sizes the factors: ``keep``, the share of the layer's parameters that they may have; ``rank``;
    ``energy``, the share of the squared singular values that the rank must hold; ``evbmf``, the rank that variational
    Bayes finds. ``bits`` means ``2 ** bits`` clusters of ``kmeans``; ``step`` is that of a ``grid`` in units of the
    weights' root mean square; ``prune`` is the share of the weights that become zero.
    """

    factorize: str | None = None
    keep: float | None = None
    rank: int | None = None
    energy: float | None = None
    evbmf: bool | None = None
    cluster: str | None = None
    bits: int | None = None
    step: float | None = None
    prune: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings by level; ``layers`` maps names or shell patterns (``layer1.*``) to settings, in file order.

    ``shrink`` is the share of its outputs that every layer keeps which just one other layer reads, unit by unit.
    ``allocate``: ``keep`` of all layers is one budget, in ``budget_unit`` (``parameters`` or ``macs``), which the
    factorized layers share, each getting what helps the model's output most; those with a size of their own keep it.
    ``prune_scope`` says what the share ``prune`` of all layers is one of: of the weights of all of them together
    (``global``), each losing what harms the model's output least, or of those of each (``layer``).
    ``average_bits`` (coded bits of all weights over their number) and ``target_size`` (bytes of model.ecz) are budgets
    of grids: the steps of all layers are sized to meet one of them. ``quantize`` = ``int8`` runs layers in 8 bits, on
    the codes of their grids; weights that are on none get 8 bits and a step for each output. ``rank_alignment``: ranks
    of factors are multiples of it, but for those that were given as numbers.
    """

    everywhere: Settings = field(default_factory=Settings)
    ops: Mapping[str, Settings] = field(default_factory=dict)
    layers: Mapping[str, Settings] = field(default_factory=dict)
    shrink: float | None = None
    allocate: bool = False
    budget_unit: str = "parameters"
    prune_scope: str = "global"
    average_bits: float | None = None
    target_size: int | None = None
    quantize: str = "none"
    rank_alignment: int = 1


def _for_int8(recipe: Recipe, where: str) -> Recipe:
    """Return the recipe with grids where nothing is said: int8 multiplies their codes, not values of a codebook."""
    levels = (recipe.everywhere, *recipe.ops.values(), *recipe.layers.values())
    if any(level.cluster == "kmeans" or level.bits is not None for level in levels):
        raise RecipeError(
            f"{where}: int8 runs on the codes of a grid, which clusters of kmeans are not",
            hint='set cluster to "grid" or "none"',
        )
    if recipe.everywhere.cluster is not None:
        return recipe
    return replace(recipe, everywhere=replace(recipe.everywhere, cluster="grid"))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe: settings for all layers at the top, ``[ops.Conv]`` and ``[layers."name or pattern"]`` tables.

    Raises ``RecipeError`` naming the key or value that is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}", hint="see docs/recipe.md for an example") from error
    sections = {name: content.pop(name, {}) for name in _SECTIONS}
    for name, section in sections.items():
        if not isinstance(section, dict) or not all(isinstance(entry, dict) for entry in section.values()):
            raise RecipeError(f"{path}: [{name}] must hold tables", hint=f'write [{name}."..."] with settings below it')
    for op in sections["ops"]:
        if op not in _OPS:
            raise RecipeError(f"{path}: unknown operator {op!r} in [ops]", hint=did_you_mean(op, _OPS))
    budget = {name: content.pop(name) for name in _WHOLE_MODEL if name in content}
    found = Recipe(
        everywhere=_settings(content, f"{path}", extra=(*_SECTIONS, *_WHOLE_MODEL)),
        ops={op: _settings(entry, f"{path}: [ops.{op}]") for op, entry in sections["ops"].items()},
        layers={name: _settings(entry, f"{path}: [layers.{name!r}]") for name, entry in sections["layers"].items()},
        **budget,
    )
    return _check_budget(found, f"{path}")


def _check_budget(recipe: Recipe, where: str) -> Recipe:
    """Return ``recipe`` if what it says of a budget can be done. Raises ``RecipeError``."""
    if not isinstance(recipe.allocate, bool):
        raise RecipeError(f"{where}: allocate must be true or false, not {recipe.allocate!r}", hint="correct the value")
    _choice(recipe.budget_unit, BUDGET_UNITS, f"{where}: budget_unit")
    if recipe.budget_unit != "parameters" and not recipe.allocate:
        raise RecipeError(f"{where}: budget_unit is that of allocate", hint="add --allocate, or leave it out")
    _choice(recipe.prune_scope, PRUNE_SCOPES, f"{where}: prune_scope")
    _whole(recipe.rank_alignment, 1, None, f"{where}: rank_alignment")
    if recipe.prune_scope != "global" and recipe.everywhere.prune is None:
        raise RecipeError(f"{where}: prune_scope is that of the prune of all layers", hint="add --prune")
    other = [name for name in sizes_in(recipe.everywhere) if name != "keep"]
    if recipe.allocate and other:
        raise RecipeError(f"{where}: allocate and {other[0]} exclude each other", hint="give keep as the budget")
    _fraction(recipe.shrink, f"{where}: shrink")
    _positive(recipe.average_bits, f"{where}: average_bits")
    _whole(recipe.target_size, 1, None, f"{where}: target_size")
    _choice(recipe.quantize, QUANTIZE_SCHEMES, f"{where}: quantize")
    if recipe.quantize == "int8":
        recipe = _for_int8(recipe, where)
    if recipe.average_bits is None and recipe.target_size is None:
        return recipe
    if recipe.average_bits is not None and recipe.target_size is not None:
        raise RecipeError(f"{where}: average_bits and target_size exclude each other", hint="give one of them")
    if recipe.everywhere.cluster not in (None, "grid") or recipe.everywhere.step is not None:
        raise RecipeError(f"{where}: a budget sizes the steps of grids", hint='set cluster to "grid", leave step out')
    return replace(recipe, everywhere=replace(recipe.everywhere, cluster="grid"))


def _settings(entry: Mapping[str, Any], where: str, *, extra: Sequence[str] = ()) -> Settings:
    known = [item.name for item in fields(Settings)]
    for key in entry:
        if key not in known:
            raise RecipeError(f"{where}: unknown option {key!r}", hint=did_you_mean(key, [*known, *extra]))
    return check_settings(Settings(**entry), where)


def check_settings(settings: Settings, where: str) -> Settings:
    """Return ``settings`` if every value is in its allowed set. Raises ``RecipeError`` naming the value and the set."""
    _choice(settings.factorize, FACTORIZE_SCHEMES, f"{where}: factorize")
    _choice(settings.cluster, CLUSTER_SCHEMES, f"{where}: cluster")
    _whole(settings.bits, 1, 8, f"{where}: bits")
    _whole(settings.rank, 1, None, f"{where}: rank")
    _fraction(settings.keep, f"{where}: keep")
    _fraction(settings.energy, f"{where}: energy")
    _check_values(settings, where)
    if settings.evbmf not in (None, True):
        raise RecipeError(f"{where}: evbmf must be true, not {settings.evbmf!r}", hint="leave it out instead")
    given = sizes_in(settings)
    if len(given) > 1:
        raise RecipeError(f"{where}: {' and '.join(given)} exclude each other", hint="give one of them")
    if settings.factorize == "none" and given:
        raise RecipeError(f"{where}: {given[0]} needs factorize", hint='set factorize to "svd"')
    if settings.factorize not in (None, "svd", "tucker2") and set(given) & {"energy", "evbmf"}:
        hint = 'set factorize to "svd" or "tucker2"'
        if settings.factorize == "auto":
            hint += ", or give keep: auto compares forms of the same share"
        raise RecipeError(f"{where}: {given[0]} chooses the ranks of svd and tucker2 only", hint=hint)
    shares = {
        name: float(value)
        for name in ("keep", "energy", "step", "prune")
        if (value := getattr(settings, name)) is not None
    }
    return replace(settings, **shares)  # type: ignore[arg-type]  # a TOML file may give the share 1 as an integer


def _check_values(settings: Settings, where: str) -> None:
    """Raise ``RecipeError`` where the settings of codebooks and grids make no sense."""
    _positive(settings.step, f"{where}: step")
    if settings.step is not None and settings.step > LARGEST_STEP:
        raise RecipeError(f"{where}: step must be at most {LARGEST_STEP:g}, not {settings.step!r}", hint="1.0 is usual")
    _fraction(settings.prune, f"{where}: prune")
    if settings.prune == 1:
        raise RecipeError(f"{where}: prune must be a share below 1, not {settings.prune!r}", hint="for example 0.5")
    if settings.cluster == "none" and settings.prune is not None:
        raise RecipeError(f"{where}: prune needs clusters or a grid, whose zero it uses", hint='set cluster to "grid"')
    if settings.cluster == "grid" and settings.bits is not None:
        raise RecipeError(f"{where}: bits are those of kmeans", hint='set cluster to "kmeans", or give step')
    if settings.cluster == "kmeans" and settings.step is not None:
        raise RecipeError(f"{where}: step is that of a grid", hint='set cluster to "grid", or give bits')
    if settings.bits is not None and settings.step is not None:
        raise RecipeError(f"{where}: bits and step exclude each other", hint="bits are for kmeans, step for grid")


def sizes_in(settings: Settings) -> list[str]:
    """Return the names of the settings that size the factors, of those that are given."""
    return [name for name in _SIZES if getattr(settings, name) is not None]


def _fraction(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0):
        raise RecipeError(f"{where} must be a share above 0 and at most 1, not {value!r}", hint="for example 0.5")


def _positive(value: Any, where: str) -> None:
    number = not isinstance(value, bool) and isinstance(value, (int, float))
    if value is not None and not (number and 0.0 < value < float("inf")):
        raise RecipeError(f"{where} must be a number above 0, not {value!r}", hint="for example 1.0")


def _choice(value: Any, allowed: Sequence[str], where: str) -> None:
    if value is not None and value not in allowed:
        raise RecipeError(
            f"{where} must be one of {', '.join(allowed)}, not {value!r}", hint=did_you_mean(str(value), allowed)
        )


def _whole(value: Any, least: int, most: int | None, where: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise RecipeError(f"{where} must be a whole number {span}, not {value!r}", hint="correct the value")


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the settings of a command line in place of its own for all layers; None is not given."""
    given = {key: value for key, value in overrides.items() if value is not None}
    budget = {key: given.pop(key) for key in _WHOLE_MODEL if key in given}
    everywhere = recipe.everywhere
    if given.keys() & set(_SIZES) or given.get("factorize") == "none":
        everywhere = replace(everywhere, rank=None, keep=None, energy=None, evbmf=None)
    if given.keys() & {"cluster", "bits", "step"}:
        everywhere = replace(everywhere, cluster=None, bits=None, step=None)
    everywhere = check_settings(replace(everywhere, **given), "options")
    return _check_budget(replace(recipe, everywhere=everywhere, **budget), "options")


def resolve(recipe: Recipe, layer: Layer) -> Settings:
    """Return the full settings of a layer: its name, then patterns in file order, then its operator, then all layers.

    A level that sizes the factors in one way hides the other ways from below it; any, set for a layer or an operator,
    asks for the scheme of all layers (``svd`` where that is none) unless that level names one, and ``bits``
    for ``kmeans``.
    """
    levels = [recipe.layers[layer.name]] if layer.name in recipe.layers else []
    levels += [
        entry for name, entry in recipe.layers.items() if name != layer.name and fnmatch.fnmatchcase(layer.name, name)
    ]
    specific = [*levels, *([recipe.ops[layer.op]] if layer.op in recipe.ops else [])]
    merged: dict[str, Any] = {}
    usual = recipe.everywhere.factorize
    scheme = usual if usual not in (None, "none") else "svd"
    everywhere = recipe.everywhere
    if everywhere.cluster is None and everywhere.step is not None:
        everywhere = replace(everywhere, cluster="grid")
    for level in [*(_implied_schemes(level, scheme) for level in specific), everywhere]:
        sized = bool(merged.keys() & set(_SIZES))
        for key, value in asdict(level).items():
            if value is not None and not (sized and key in _SIZES):
                merged.setdefault(key, value)
    merged.setdefault("factorize", "none")
    if merged.setdefault("cluster", "kmeans") == "kmeans":
        merged.setdefault("bits", DEFAULT_BITS)
        merged.pop("step", None)
    else:
        merged.pop("bits", None)
    if merged["cluster"] == "grid":
        merged.setdefault("step", DEFAULT_STEP)
    if merged["factorize"] != "none" and not merged.keys() & set(_SIZES):
        merged["keep"] = DEFAULT_KEEP
    return Settings(**merged)


def _implied_schemes(level: Settings, scheme: str | None) -> Settings:
    if level.factorize is None and sizes_in(level):
        level = replace(level, factorize=scheme)
    if level.cluster is None and level.step is not None:
        return replace(level, cluster="grid")
    return replace(level, cluster="kmeans") if level.cluster is None and level.bits is not None else level


def names_layer(recipe: Recipe, name: str) -> bool:
    """Tell whether a recipe has settings for this very layer, by its name or a pattern."""
    return any(pattern == name or fnmatch.fnmatchcase(name, pattern) for pattern in recipe.layers)


def check_recipe(recipe: Recipe, entries: Sequence[Layer | Skip]) -> None:
    """Raise ``RecipeError`` for a layer that the model does not have, or a size of factors that nothing asks for."""
    names = [entry.name for entry in entries]
    for pattern in recipe.layers:
        if pattern not in names and not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"the recipe names layer {pattern!r}, which the model does not have", hint=did_you_mean(pattern, names)
            )
    everywhere = recipe.everywhere
    sizes = sizes_in(everywhere)
    specific = (*recipe.ops.values(), *recipe.layers.values())
    if sizes and everywhere.factorize is None and not any(entry.factorize not in (None, "none") for entry in specific):
        raise RecipeError(f"{sizes[0]} needs factorize", hint="add --factorize svd (or factorize in the recipe)")


def recipe_hash(recipe: Recipe) -> str:
    """Return a short hash that is equal for recipes that ask for the same."""
    content = asdict(recipe)
    content["layers"] = list(content["layers"].items())  # patterns apply in this order
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
