"""What a bundle is built for: one TOML file per target."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from edgecompress.errors import UsageError, did_you_mean
from edgecompress.files import shared_folder

ModelForm = Literal["onnx", "ecz"]
_FORMS = ("ecz", "onnx")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of machine and the runtime that models run on there.

    ``max_opset`` and ``max_ir_version`` are the newest that ``runtime_version`` loads. ``model_form`` is the file that
    a bundle carries, ``threads`` what its program uses unless told otherwise, ``default_device`` where it is timed.
    """

    name: str
    architecture: str
    runtime_package: str
    runtime_version: str
    providers: tuple[str, ...]
    threads: int
    model_form: ModelForm
    max_opset: int
    max_ir_version: int
    default_device: str


# Key in the file -> (field, type). A name with a dot lies in the table before the dot.
_KEYS: dict[str, tuple[str, type]] = {
    "name": ("name", str),
    "architecture": ("architecture", str),
    "threads": ("threads", int),
    "model_form": ("model_form", str),
    "default_device": ("default_device", str),
    "runtime.package": ("runtime_package", str),
    "runtime.version": ("runtime_version", str),
    "runtime.providers": ("providers", list),
    "runtime.max_opset": ("max_opset", int),
    "runtime.max_ir_version": ("max_ir_version", int),
}
_TYPE_NAMES = {str: "a text", int: "a whole number above 0", list: "a list of texts"}


def list_targets() -> tuple[str, ...]:
    """Return the names of the targets that ship with the tool, sorted."""
    return tuple(sorted(path.stem for path in shared_folder("targets").glob("*.toml")))


def load_target(name_or_path: str | Path) -> Target:
    """Return the target of that name, or the one described by a ``.toml`` file of your own.

    Raises ``UsageError`` for an unknown name and for a file that is missing, malformed or has unknown keys.
    """
    text = str(name_or_path)
    if text.endswith(".toml"):
        return _read_target(Path(text))
    if text not in list_targets():
        hint = did_you_mean(text, list_targets()) + "; or give the path of a .toml file"
        raise UsageError(f"there is no target {text!r}", hint=hint)
    return _read_target(shared_folder("targets") / f"{text}.toml")


def _read_target(path: Path) -> Target:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the target file {path} cannot be read: {reason}", hint="check the path") from error
    except ValueError as error:  # malformed TOML, or not UTF-8
        raise UsageError(
            f"the target file {path} is not TOML: {error}", hint="start from a copy of x86_64.toml"
        ) from error
    values = _flatten(table)
    for key in values:
        if key not in _KEYS:
            raise UsageError(f"{path}: unknown key {key!r}", hint=did_you_mean(key, _KEYS))
    return Target(**{field: _checked(values, key, kind, path) for key, (field, kind) in _KEYS.items()})


def _flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``table`` with the entries of its tables under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return flat


def _checked(values: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    if key not in values:
        raise UsageError(f"{path}: the key {key!r} is missing", hint=f"it is {_TYPE_NAMES[kind]}")
    value = values[key]
    good = isinstance(value, kind) and not isinstance(value, bool) and bool(value)
    if good and kind is int:
        good = value > 0
    if good and kind is list:
        good = all(isinstance(item, str) and item for item in value)
    if not good:
        raise UsageError(f"{path}: {key} = {value!r} is not {_TYPE_NAMES[kind]}", hint="correct it in that file")
    if key == "model_form" and value not in _FORMS:
        raise UsageError(f"{path}: model_form = {value!r} is not known", hint=did_you_mean(value, _FORMS))
    return tuple(cast("list[str]", value)) if kind is list else value
