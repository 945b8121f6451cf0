"""What a bundle is built for: one TOML file per target; see docs/targets.md."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgecompress.errors import UsageError, did_you_mean
from edgecompress.files import shared_folder

System = Literal["linux", "android", "ios", "web"]
ModelForm = Literal["ecz", "onnx", "self_extracting", "ort"]
RuntimeForm = Literal["wheel", "native", "wasm", "gradle", "swift"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The runtime that a target's models run on, and the newest models that this version of it loads.

    ``form`` is what a bundle carries unless told otherwise: Python wheels, a C library with a program of ours,
    WebAssembly, or a Gradle or Swift module that names the published ``package``.
    """

    form: RuntimeForm
    package: str
    version: str
    providers: tuple[str, ...]
    max_opset: int
    max_ir_version: int


@dataclass(frozen=True, kw_only=True)
class WheelForm:
    """Where the runtime comes as wheels: for which Python, e.g. ``3.11``, and platform tags, best first."""

    python: str
    platforms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NativeForm:
    """Where the runtime comes as a C library.

    ``compiler`` is the triple that zig compiles our program for, ``loader`` the file name of the dynamic loader,
    ``debian_packages`` of ``debian_suite`` for ``debian_architecture`` hold it, the libraries that it needs and, where
    ``runtime_from`` is ``debian``, the runtime itself; where it is ``wheel``, that is taken out of the wheel.
    """

    compiler: str
    loader: str
    runtime_from: Literal["wheel", "debian"]
    debian_architecture: str
    debian_suite: str
    debian_packages: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of machine and the runtime that models run on there.

    ``model_form`` is the file that a bundle carries, ``threads`` what its program uses unless told otherwise,
    ``rank_alignment`` what ranks of factors are multiples of, ``default_device`` where it is timed. ``architecture`` is
    as ``uname -m`` says it.
    """

    name: str
    system: System
    architecture: str
    threads: int
    model_form: ModelForm
    rank_alignment: int
    default_device: str
    runtime: Runtime
    wheel: WheelForm | None = None
    native: NativeForm | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """The runtime forms that a bundle for it can have, the default one first."""
        tables = {"wheel": self.wheel, "native": self.native}
        others = [name for name, table in tables.items() if table is not None and name != self.runtime.form]
        return (self.runtime.form, *others, "none")


# What a key holds: a text, a whole number above 0, a list of texts, or one of these texts.
_Kind = type | tuple[str, ...]
_KEYS: dict[str, dict[str, _Kind]] = {
    "": {
        "name": str,
        "system": ("linux", "android", "ios", "web"),
        "architecture": ("x86_64", "aarch64", "armv7l", "wasm32", "universal"),
        "threads": int,
        "model_form": ("ecz", "onnx", "self_extracting", "ort"),
        "rank_alignment": int,
        "default_device": str,
    },
    "runtime": {
        "form": ("wheel", "native", "wasm", "gradle", "swift"),
        "package": str,
        "version": str,
        "providers": list,
        "max_opset": int,
        "max_ir_version": int,
    },
    "wheel": {"python": str, "platforms": list},
    "native": {
        "compiler": str,
        "loader": str,
        "runtime_from": ("wheel", "debian"),
        "debian_architecture": str,
        "debian_suite": str,
        "debian_packages": list,
    },
}
_OPTIONAL = ("wheel", "native")
MAX_NUMBER = 1024
_TYPE_NAMES = {str: "a text", int: f"a whole number from 1 to {MAX_NUMBER}", list: "a list of texts", dict: "a table"}

# What a text is, each one of a list: they become parts of file names, of commands and of programs' sources.
_FILE_NAME = "[A-Za-z0-9_][A-Za-z0-9._+-]{0,99}"
_PATTERNS = {
    "": {
        "name": _FILE_NAME,
        "default_device": "(local|ssh|adb|container|qemu|browser)(://([!-,.-~][!-~]{0,999})?)?",
    },
    "runtime": {
        "package": "(@[a-z0-9._-]+/)?[A-Za-z0-9][A-Za-z0-9._+-]*(:[A-Za-z0-9][A-Za-z0-9._-]*)?",
        "version": "[0-9][A-Za-z0-9.+~-]*",
        "providers": "[A-Za-z][A-Za-z0-9_]*",
    },
    "wheel": {"python": r"[0-9]{1,2}\.[0-9]{1,3}", "platforms": "[A-Za-z0-9_]+"},
    "native": {
        "compiler": "[a-z0-9_]+(-[a-z0-9_.]+)+",
        "loader": _FILE_NAME,
        "debian_architecture": "[a-z0-9][a-z0-9-]*",
        "debian_suite": "[a-z0-9][a-z0-9.-]*",
        "debian_packages": "[a-z0-9][a-z0-9+.-]*",
    },
}
# The architectures of a system, and the forms of the runtime that it has.
_SYSTEMS = {
    "linux": (("x86_64", "aarch64", "armv7l"), ("wheel", "native")),
    "android": (("universal",), ("gradle",)),
    "ios": (("universal",), ("swift",)),
    "web": (("wasm32",), ("wasm",)),
}


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
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"the target file {path} cannot be read: {reason}", hint="check the path") from error
    except ValueError as error:  # malformed TOML, or not UTF-8
        raise UsageError(
            f"the target file {path} is not TOML: {error}", hint="start from a copy of x86_64.toml"
        ) from error
    names = [name for name in _KEYS if name]
    top = _checked_table({key: value for key, value in content.items() if key not in names}, "", path)
    tables = {name: _checked_table(content.get(name), name, path) for name in names if _present(content, name)}
    target = Target(
        **top,
        runtime=Runtime(**tables["runtime"]),
        wheel=WheelForm(**tables["wheel"]) if "wheel" in tables else None,
        native=NativeForm(**tables["native"]) if "native" in tables else None,
    )
    form = target.runtime.form
    if form in _OPTIONAL and form not in tables:
        raise UsageError(f"{path}: the table [{form}] is missing", hint=f"runtime.form = {form!r} needs it")
    _check_system(target, path)
    return target


def is_device(text: str) -> bool:
    """Tell whether a text can be the address of a device: ``local`` or one of the known schemes with an address."""
    return re.fullmatch(_PATTERNS[""]["default_device"], text) is not None


def _check_system(target: Target, path: Path) -> None:
    """Raise ``UsageError`` where a system does not have the architecture or a form of the runtime."""
    architectures, forms = _SYSTEMS[target.system]
    wrong = [form for form in target.forms if form not in (*forms, "none")]
    for key, found, allowed in (
        ("architecture", [target.architecture], architectures),
        ("runtime form", wrong, forms),
    ):
        if found and found[0] not in allowed:
            raise UsageError(
                f"{path}: {target.system} has no {key} {found[0]!r}", hint=f"allowed: {', '.join(allowed)}"
            )


def _present(content: Mapping[str, Any], name: str) -> bool:
    return name in content or name not in _OPTIONAL


def _checked_table(table: object, name: str, path: Path) -> dict[str, Any]:
    """Return the values of one table after checking that its keys are the known ones and their values fit."""
    prefix = f"{name}." if name else ""
    if not isinstance(table, dict):
        what = "is missing" if table is None else f"= {table!r} is not a table"
        raise UsageError(f"{path}: [{name}] {what}", hint=f"it has the keys {', '.join(_KEYS[name])}")
    for key in table:
        if key not in _KEYS[name]:
            tables = [] if name else [table for table in _KEYS if table]
            raise UsageError(f"{path}: unknown key {prefix + key!r}", hint=did_you_mean(key, [*_KEYS[name], *tables]))
    values = {key: _checked(table, key, kind, f"{path}: {prefix}") for key, kind in _KEYS[name].items()}
    for key, pattern in _PATTERNS[name].items():
        for text in (values[key],) if isinstance(values[key], str) else values[key]:
            if not re.fullmatch(pattern, text):
                hint = f"write it as the shipped targets do; it has to match {pattern}"
                raise UsageError(f"{path}: {prefix}{key} = {text!r} cannot be", hint=hint)
    return values


def _checked(table: Mapping[str, Any], key: str, kind: _Kind, place: str) -> Any:
    wanted = f"one of {', '.join(kind)}" if isinstance(kind, tuple) else _TYPE_NAMES[kind]
    if key not in table:
        raise UsageError(f"{place}{key} is missing", hint=f"it is {wanted}")
    value = table[key]
    if isinstance(kind, tuple):
        if value not in kind:
            raise UsageError(f"{place}{key} = {value!r} is not known", hint=did_you_mean(str(value), kind))
        return value
    good = isinstance(value, kind) and not isinstance(value, bool) and bool(value)
    if kind is int:
        good = good and 0 < value <= MAX_NUMBER
    if kind is list:
        good = good and all(isinstance(item, str) and item for item in value)
    if not good:
        raise UsageError(f"{place}{key} = {value!r} is not {wanted}", hint="correct it in that file")
    return tuple(value) if kind is list else value
