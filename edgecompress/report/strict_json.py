"""Frozen dataclasses to strict JSON and back, driven by their type annotations alone.

Understood are ``int``, ``float``, ``str``, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` and frozen dataclasses.
JSON has no NaN and no infinity: where a field may be ``None`` they become ``null``, elsewhere they are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, TypeVar

from edgecompress.errors import FormatError, PassError

T = TypeVar("T")


def encode(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON values, keys in the order of its fields.

    numpy scalars become numbers. Raises ``PassError`` for a value that its field's type forbids: the caller's defect.
    """
    plain: dict[str, Any] = _encode(value, type(value), type(value).__name__.lower())
    return plain


def dumps(plain: Any, indent: str = "") -> str:
    """Return JSON text: two spaces of indent, a list of plain values on one line, ASCII only.

    ASCII, so that neither a terminal's nor a file's encoding can change or break it.
    """
    inner = indent + "  "
    if isinstance(plain, dict) and plain:
        rows = [f"{inner}{json.dumps(key)}: {dumps(value, inner)}" for key, value in plain.items()]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(plain, list) and any(isinstance(item, dict | list) for item in plain):
        return "[\n" + ",\n".join(inner + dumps(item, inner) for item in plain) + f"\n{indent}]"
    return json.dumps(plain, allow_nan=False)


def loads(text: str) -> Any:
    """Parse strict JSON. Raises ``FormatError`` for anything else, NaN and Infinity included."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"this is not strict JSON: {error}", hint="check that the file is whole") from error


def decode(plain: Any, kind: type[T]) -> T:
    """Return a ``kind`` built from parsed JSON; keys that it does not know are ignored.

    Raises ``FormatError`` that names the place, for a key that is missing or a value of another type.
    """
    value: T = _decode(plain, kind, kind.__name__.lower())
    return value


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the resolved annotation of every field of a dataclass, in order."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def optional_of(kind: Any) -> Any | None:
    """Return ``X`` where ``kind`` is ``X | None``, else ``None``."""
    if isinstance(kind, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return None


def _encode(value: Any, kind: Any, place: str) -> Any:
    inner = optional_of(kind)
    if inner is not None:
        unknown = value is None or (inner is float and not math.isfinite(value))
        return None if unknown else _encode(value, inner, place)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return [_encode(part, item, f"{place}[{index}]") for index, part in enumerate(value)]
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        return {_text(key): _encode(part, item, f"{place}.{key}") for key, part in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        fields = field_types(kind).items()
        return {name: _encode(getattr(value, name), part, f"{place}.{name}") for name, part in fields}
    return _encode_plain(value, kind, place)


def _encode_plain(value: Any, kind: Any, place: str) -> int | float | str:
    """Return one number or string, of the type that is promised."""
    try:
        if kind is str and isinstance(value, str):
            return _text(value)
        if kind is int and int(value) == value:
            return int(value)
        if kind is float and math.isfinite(value):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PassError(f"{place} is {value!r}, which is no {kind.__name__}", hint="this is a defect of edgecompress")


def _text(value: str) -> str:
    """Return ``value`` without lone surrogates (an argument that is not UTF-8), which no JSON reader must accept."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _decode(plain: Any, kind: Any, place: str) -> Any:
    inner = optional_of(kind)
    if inner is not None:
        return None if plain is None else _decode(plain, inner, place)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        rows = _of_type(plain, list, place, "a list")
        return tuple(_decode(part, item, f"{place}[{index}]") for index, part in enumerate(rows))
    if typing.get_origin(kind) is dict:
        item = typing.get_args(kind)[1]
        rows = _of_type(plain, dict, place, "an object")
        return {key: _decode(part, item, f"{place}.{key}") for key, part in rows.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        rows = _of_type(plain, dict, place, "an object")
        missing = [name for name in field_types(kind) if name not in rows]
        if missing:
            raise _malformed(f"{place} has no {missing[0]!r}")
        return kind(**{name: _decode(rows[name], part, f"{place}.{name}") for name, part in field_types(kind).items()})
    if kind is str:
        return _of_type(plain, str, place, "a string")
    return _decode_number(plain, kind, place)


def _decode_number(plain: Any, kind: Any, place: str) -> int | float:
    if kind is int:
        return typing.cast("int", _of_type(plain, int, place, "an integer"))
    number = _of_type(plain, int | float, place, "a number")
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):  # 1e999 is valid JSON and reads as infinity
        raise _malformed(f"{place} is too large a number")
    return value


def _of_type(plain: Any, kind: Any, place: str, expected: str) -> Any:
    """Return ``plain`` if it is of the Python type ``kind`` (a bool is no number)."""
    if isinstance(plain, bool) or not isinstance(plain, kind):
        raise _malformed(f"{place} must be {expected}, not {_shorten(plain)}")
    return plain


def _shorten(plain: Any) -> str:
    text = json.dumps(plain)
    return text if len(text) <= 40 else text[:37] + "..."


def _malformed(message: str) -> FormatError:
    return FormatError(message, hint="the file is damaged or was not written by this version of edgecompress")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
