"""One tensor in a file: the TensorProto message of ONNX, the form of the field's own test data.

Bundles carry this file as it is: standard library and numpy only. Written from onnx.proto: dims = 1, data_type = 2,
string_data = 6, name = 8, raw_data = 9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError, FormatError

Array = npt.NDArray[Any]

_STRING = 8
_CODES = {
    "f4": 1,
    "u1": 2,
    "i1": 3,
    "u2": 4,
    "i2": 5,
    "i4": 6,
    "i8": 7,
    "b1": 9,
    "f2": 10,
    "f8": 11,
    "u4": 12,
    "u8": 13,
    "c8": 14,
    "c16": 15,
}
_DTYPES = {code: np.dtype(f"<{name}") for name, code in _CODES.items()}
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # wire types


def write_tensor(name: str, value: Any) -> bytes:
    """Return the message of a tensor: texts as ``string_data``, all else as little-endian ``raw_data``.

    Raises ``DataError`` for what is no tensor, or of a type that no file holds.
    """
    array = np.asarray(value)
    texts = array.dtype.kind in "US" or (
        array.dtype.kind == "O" and all(isinstance(item, str | bytes) for item in array.flat)
    )
    code = _STRING if texts else _CODES.get(array.dtype.str[1:])
    if code is None:
        hint = "only models with tensors as inputs and outputs are bundled"
        raise DataError(f"{name!r} is no tensor that a file can hold (type {array.dtype})", hint=hint)
    parts = [_field(1, _VARINT) + _varint(size) for size in array.shape]
    parts.append(_field(2, _VARINT) + _varint(code))
    if texts:
        parts += [_bytes_field(6, item if isinstance(item, bytes) else item.encode()) for item in array.flat]
    parts.append(_bytes_field(8, name.encode()))
    if not texts:
        parts.append(_bytes_field(9, np.ascontiguousarray(array, dtype=_DTYPES[code]).tobytes()))
    return b"".join(parts)


def read_tensor(data: bytes) -> tuple[str, Array]:
    """Return name and value of a message that ``write_tensor`` or any tool of the field wrote with ``raw_data``.

    Texts come as an array of ``str`` objects. Raises ``FormatError`` for anything else.
    """
    try:
        return _read(data)
    except (ValueError, IndexError) as error:  # a UnicodeDecodeError is a ValueError
        raise FormatError(f"not a tensor file: {error}", hint="build the bundle again") from None


def _read(data: bytes) -> tuple[str, Array]:
    dims: list[int] = []
    texts: list[str] = []
    code, name, raw = 0, "", b""
    for number, value in _fields(data):
        if number == 1:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            code = value
        elif isinstance(value, bytes) and number in (6, 8, 9):
            if number == 6:
                texts.append(value.decode())
            elif number == 8:
                name = value.decode()
            else:
                raw = value
        else:
            raise ValueError(f"field {number} is not supported")
    if code != _STRING and code not in _DTYPES:
        raise ValueError(f"data type {code} is not supported")
    count, found = math.prod(dims), len(texts) if code == _STRING else len(raw) / _DTYPES[code].itemsize
    if found != count:
        raise ValueError(f"{found:g} values instead of {count}")
    array: Array = np.array(texts, dtype=object) if code == _STRING else np.frombuffer(raw, _DTYPES[code]).copy()
    return name, array.reshape(dims)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field of a message."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        kind, size = key & 7, 0
        if kind == _VARINT:
            value, at = _read_varint(data, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            size, at = _read_varint(data, at)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {kind} is not supported")
        if at + size > len(data):
            raise ValueError("it was cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _packed(data: bytes) -> list[int]:
    values, at = [], 0
    while at < len(data):
        value, at = _read_varint(data, at)
        values.append(value)
    return values


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]  # an IndexError says that it was cut short
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 63:  # a negative size, or more than any file holds
                raise ValueError("a number is out of range")
            return value, at
    raise ValueError("a number is too long")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _field(number, _BYTES) + _varint(len(value)) + value
