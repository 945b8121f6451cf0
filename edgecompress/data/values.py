"""Values of a dataset.toml, each read strictly: the key, the value and what is allowed are named on error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from edgecompress.errors import DataError, did_you_mean


def _number(value: Any, key: str, where: str) -> float:
    """Read a finite number, or a fraction as text, "1/255"."""
    match = re.fullmatch(r"\s*([\d.]+)\s*/\s*([\d.]+)\s*", value) if isinstance(value, str) else None
    try:
        number: Any = float(match[1]) / float(match[2]) if match else value
    except (ValueError, ZeroDivisionError):
        number = None
    if type(number) not in (int, float) or not math.isfinite(number):
        raise wrong(where, key, value, 'a number, or a fraction such as "1/255"')
    return float(number)


def _numbers(value: Any, key: str, where: str) -> tuple[float, ...]:
    """Read one number or a list of them."""
    if isinstance(value, list) and not value:
        raise wrong(where, key, value, "a number, or one for each channel or column")
    return tuple(_number(each, key, where) for each in (value if isinstance(value, list) else [value]))


def _choice(*allowed: str) -> Callable[[Any, str, str], Any]:
    """Return a reader of one of some words."""

    def read(value: Any, key: str, where: str) -> Any:
        if value not in allowed:
            raise DataError(f"{where}: {key} = {value!r} is not allowed", hint=did_you_mean(str(value), allowed))
        return value

    return read


def _size(value: Any, key: str, where: str) -> tuple[int, int]:
    """Read [height, width]."""
    if not (isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)):
        raise wrong(where, key, value, "[height, width] in pixels")
    return value[0], value[1]


def _resize(value: Any, key: str, where: str) -> Any:
    """Read the length of the shorter side, or "cover"."""
    if value != "cover" and not (type(value) is int and value > 0):
        raise wrong(where, key, value, 'the length of the shorter side in pixels, or "cover"')
    return value


READERS: dict[str, Callable[[Any, str, str], Any]] = {
    "resize": _resize,
    "crop": _choice("centre", "none"),
    "size": _size,
    "channel_order": _choice("RGB", "BGR"),
    "binarize": _number,
    "scale": _number,
    "mean": _numbers,
    "std": _numbers,
    "layout": _choice("NCHW", "NHWC", "flat"),
    "dtype": _choice(
        "float16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
    ),
}


def known(table: Iterable[str], allowed: Sequence[str], where: str) -> None:
    """Raise ``DataError`` for the first key that is not allowed."""
    for key in table:
        if key not in allowed:
            raise DataError(f"{where}: unknown key {key!r}", hint=did_you_mean(key, allowed))


def text(value: Any, key: str, where: str) -> str:
    """Return a value that must be non-empty text."""
    if not isinstance(value, str) or not value:
        raise wrong(where, key, value, "text")
    return value


def wrong(where: str, key: str, value: Any, allowed: str) -> DataError:
    """Build the error for a value of the wrong kind."""
    return DataError(f"{where}: {key} = {value!r} is not allowed", hint=f"it must be {allowed}")
