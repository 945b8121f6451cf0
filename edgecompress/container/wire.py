"""Finding the weights in the bytes of an ONNX file, from the wire format of protocol buffers, without the onnx package.

Only the messages that can lead to a tensor are opened: model, training info, functions, graphs, nodes, attributes,
sparse tensors, tensors. The numbers are the field numbers of onnx.proto, which never change.
Source: "Protocol Buffers: Encoding", and the message definitions of the ONNX intermediate representation.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgecompress.errors import ModelError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100  # what the reference implementation of protocol buffers accepts

# message -> field -> message of the field
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_IR_VERSION = 1
_PAYLOAD_FIELDS = {4: 4, 5: 1, 7: 1, 9: 0, 10: 8, 11: 1}  # field of a tensor -> bytes per element, 0: by the data type
_ELEMENT_BYTES = {1: 4, 4: 2, 5: 2, 6: 4, 7: 8, 10: 2, 11: 8, 12: 4, 13: 8, 14: 4, 15: 8, 16: 2}
_EXTERNAL = 1
_MAX_ENTRY_BYTES = 4096  # of a file name that is looked for in a file that nobody vouches for

Buffer = bytes | mmap.mmap


@dataclass(frozen=True)
class Payload:
    """Bytes ``start`` to ``end`` of a file that hold the values of a tensor, in elements of ``width`` bytes.

    ``dims`` are the tensor's if it has so many elements, else empty.
    """

    name: str
    data_type: int
    start: int
    end: int
    width: int
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class External:
    """Values that lie in another file; ``length`` is None where it is not recorded."""

    name: str
    data_type: int
    location: str
    offset: int
    length: int | None
    width: int
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Weights:
    """All tensor values of a model, in the order of the file."""

    payloads: tuple[Payload, ...]
    externals: tuple[External, ...]


def find_weights(path: Path) -> Weights:
    """Find all tensor values of the ONNX file ``path``. Raises ``ModelError`` if it is none."""
    try:
        with path.open("rb") as handle:
            if path.stat().st_size == 0:
                raise ModelError(f"{path}: not an ONNX file: it is empty", hint=_HINT)
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return scan(data, str(path))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from error


_HINT = "give a model in ONNX format, completely downloaded"


def scan(data: Buffer, name: str) -> Weights:
    """Find all tensor values in a serialized ModelProto; ``name`` is for messages. Raises ``ModelError``."""
    try:
        present = {field for field, _, _, _ in _fields(data, 0, len(data))}
        if _IR_VERSION not in present or not present & {7, 25}:
            lacking = "IR version" if _IR_VERSION not in present else "graph"
            raise ModelError(f"{name}: not an ONNX file, or truncated: it has no {lacking}", hint=_HINT)
        return _walk(data)
    except _TruncatedError:
        raise ModelError(f"{name}: truncated, or not an ONNX file: it ends inside a field", hint=_HINT) from None
    except _WireError as error:
        raise ModelError(f"{name}: not an ONNX file: {error}", hint=_HINT) from None


def find_unreferenced(path: Path, names: set[str]) -> set[str]:
    """Return those of ``names`` in which no tensor of the ONNX file ``path`` has its data; all if it is no ONNX file.

    For files that nobody vouches for: the memory it takes does not grow with what the file says.
    """
    missing = set(names)
    if path.stat().st_size == 0:
        return missing
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for start, end in _tensors(data):
                missing.discard(_location(data, start, end))
                if not missing:
                    break
        except _WireError:
            pass  # what was found until here counts, the rest is refused
    return missing


def _location(data: Buffer, start: int, end: int) -> str:
    """Return the normal form of the file name that a tensor has its data in, "" if it has none."""
    location, text = 0, ""
    for field, kind, low, high in _fields(data, start, end):
        if field == 14 and kind == _VARINT:
            location, _ = _varint(data, low, high)
        elif field == 13 and kind == _BYTES and high - low <= _MAX_ENTRY_BYTES:
            key, value = _entry(data, low, high)
            text = value if key == "location" else text
    return os.path.normpath(text) if location == _EXTERNAL and text else ""


def _walk(data: Buffer) -> Weights:
    """Read every tensor."""
    payloads: list[Payload] = []
    externals: list[tuple[int, External]] = []
    for start, end in _tensors(data):
        _scan_tensor(data, start, end, (payloads, externals))
    in_order = sorted(externals, key=lambda found: found[0])
    return Weights(tuple(sorted(payloads, key=lambda p: p.start)), tuple(external for _, external in in_order))


def _tensors(data: Buffer) -> Iterator[tuple[int, int]]:
    """Yield start and end of every tensor, opening the messages that can lead to one, without recursion."""
    stack = [("model", _fields(data, 0, len(data)))]
    while stack:
        message, fields = stack[-1]
        found = next(fields, None)
        if found is None:
            stack.pop()
            continue
        field, kind, low, high = found
        child = _CHILDREN[message].get(field)
        if child is None:
            continue
        if kind != _BYTES:
            raise _WireError(f"field {field} of a {message} has wire type {kind}")
        if len(stack) > _MAX_DEPTH:
            raise _WireError(f"messages nested more than {_MAX_DEPTH} deep")
        if child == "tensor":
            yield low, high
        else:
            stack.append((child, _fields(data, low, high)))


class _WireError(Exception):
    """The bytes are no message."""


class _TruncatedError(_WireError):
    """The file ends inside a field."""


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field, wire type, start, end) of the value of every field in a message."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        field, kind = tag >> 3, tag & 7
        low = at
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind == _FIXED64:
            at += 8
        elif kind == _FIXED32:
            at += 4
        elif kind == _BYTES:
            size, low = _varint(data, at, end)
            at = low + size
        else:
            raise _WireError(f"wire type {kind} at byte {low}")
        if field == 0 or field > 2**29 - 1:
            raise _WireError(f"field number {field} at byte {low}")
        if at > end:
            raise _overrun(data, end)
        yield field, kind, low, at


def _overrun(data: Buffer, end: int) -> _WireError:
    """Return the error for a field that ends beyond its message."""
    return _TruncatedError() if end == len(data) else _WireError(f"a field reaches beyond its message at byte {end}")


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    """Read a base-128 number of at most ten bytes."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _overrun(data, end)
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _WireError(f"a number of more than ten bytes at byte {at}")


def _scan_tensor(data: Buffer, start: int, end: int, found: tuple[list[Payload], list[tuple[int, External]]]) -> None:
    """Add the values of one TensorProto to (payloads, externals) of ``found``."""
    name = ""
    numbers: dict[int, list[int]] = {1: [], 2: [0], 14: [0]}  # dims, data type, data location
    values: list[tuple[int, int, int]] = []
    entries: dict[str, str] = {}
    for field, kind, low, high in _fields(data, start, end):
        if field == 1 or (field in numbers and kind == _VARINT):
            numbers[field] += _numbers(data, low, high)
        elif kind != _BYTES:
            continue
        elif field == 8:
            name = data[low:high].decode("utf-8", "replace")
        elif field == 13:
            key, value = _entry(data, low, high)
            entries[key] = value
        elif field in _PAYLOAD_FIELDS and high > low:
            values.append((field, low, high))
    payloads, externals = found
    dims, data_type, location = tuple(numbers[1]), numbers[2][-1], numbers[14][-1]
    for field, low, high in values:
        width = _PAYLOAD_FIELDS[field] or _ELEMENT_BYTES.get(data_type, 1)
        payloads.append(make_payload(External(name, data_type, "", low, None, width, dims), low, high))
    if location == _EXTERNAL:
        externals.append((start, _external(name, data_type, entries, dims)))


def make_payload(tensor: External, start: int, end: int) -> Payload:
    """Return bytes ``start`` to ``end`` as values of ``tensor``; its width and dims count only where they fit."""
    size = end - start
    width = tensor.width if size % tensor.width == 0 else 1
    dims = tensor.dims if math.prod(tensor.dims) * width == size else ()
    return Payload(tensor.name, tensor.data_type, start, end, width, dims)


def _numbers(data: Buffer, start: int, end: int) -> Iterator[int]:
    """Yield the numbers in ``start`` to ``end``: one, or several in packed form."""
    at = start
    while at < end:
        value, at = _varint(data, at, end)
        yield value


def _entry(data: Buffer, start: int, end: int) -> tuple[str, str]:
    """Read a StringStringEntryProto."""
    pair = {1: "", 2: ""}
    for field, kind, low, high in _fields(data, start, end):
        if field in pair and kind == _BYTES:
            try:
                pair[field] = data[low:high].decode("utf-8")
            except UnicodeDecodeError:
                raise _WireError("external data with a text that is not UTF-8") from None
    return pair[1], pair[2]


def _external(name: str, data_type: int, entries: dict[str, str], dims: tuple[int, ...]) -> External:
    """Return where an external tensor lies."""
    if not entries.get("location"):
        raise _WireError(f"tensor {name!r} is external but names no file")
    numbers: dict[str, int | None] = {"offset": 0, "length": None}
    for key in numbers:
        text = entries.get(key)
        if text is not None:
            if not (text.isascii() and text.isdigit() and len(text) < 19):
                raise _WireError(f"tensor {name!r} has the external {key} {text[:40]!r}")
            numbers[key] = int(text)
    width = _ELEMENT_BYTES.get(data_type, 1)
    return External(name, data_type, entries["location"], numbers["offset"] or 0, numbers["length"], width, dims)
