"""Writing an `.ecz` file: the weights of an ONNX file coded, all its other bytes deflated (SPEC.md)."""

from __future__ import annotations

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgecompress.container.meta import Cut, Entry, Group, write_meta
from edgecompress.container.planes import Coded, code_stream, deflate
from edgecompress.container.sources import Source, find_sources
from edgecompress.container.tables import Tables
from edgecompress.errors import ModelError, OutputError
from edgecompress.files import output_errors, staged_file
from edgecompress.runtime.format import is_ecz
from edgecompress.runtime.layout import PREFIX, Mode, Plane

if TYPE_CHECKING:
    from edgecompress.container.wire import Payload

_CHUNK_BYTES = 1 << 23  # coded at a time; bounds the memory of writer and reader
_OWN_STREAM_BYTES = 2048  # smaller tensors share a stream with others of their type
_SKELETON_BYTES = 32  # still smaller ones stay in the skeleton

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TensorBytes:
    """What the values of one tensor take in the ONNX file and in the `.ecz` file."""

    name: str
    payload_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class PackResult:
    """Sizes of all input files together and of the `.ecz` file, and of each tensor coded apart from the rest."""

    original_bytes: int
    stored_bytes: int
    tensors: tuple[TensorBytes, ...]


@dataclass
class _State:
    """What is known while an `.ecz` file is written."""

    out: BinaryIO
    streams: list[Entry] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)
    known: dict[bytes, int] = field(default_factory=dict)
    open_groups: dict[tuple[int, int], Group] = field(default_factory=dict)
    tensors: list[tuple[Payload, int, Group | None]] = field(default_factory=list)


def pack(source: Path, destination: Path, *, force: bool = False, progress: Progress | None = None) -> PackResult:
    """Write the ONNX file ``source`` and its external data files to ``destination`` as one `.ecz` file.

    Lossless for any ONNX file, whatever its operators. The same input gives the same bytes. Files are read in chunks,
    so memory does not grow with them. ``progress`` is called with (bytes read, bytes in all).

    Raises ``ModelError`` if ``source`` is no ONNX file or its data is missing or not beside it, ``OutputError`` where
    ``destination`` exists (without ``force``) or cannot be written.
    """
    _refuse_packed(source)
    sources = find_sources(source)
    if destination.resolve() in {item.path.resolve() for item in sources}:
        raise OutputError(f"{destination}: the output would replace the input", hint="choose another output")
    total = sum(item.size for item in sources)
    with staged_file(destination, force=force) as staging, output_errors(destination), staging.open("wb") as out:
        state = _State(out)
        out.write(bytes(PREFIX.size))
        files = []
        done = 0
        for item in sources:
            report = _shifted(progress, done, total)
            files.append((item, *_write_payloads(state, item, report)))
            done += item.size
        _write_groups(state)
        stored = write_meta(out, state.streams, state.tables.entries, files)
    return PackResult(total, stored, _tensor_bytes(state))


def _shifted(progress: Progress | None, done: int, total: int) -> Callable[[int], None]:
    """Return a callback that reports a position in one file as one in all files together."""

    def report(at: int) -> None:
        if progress is not None:
            progress(done + at, total)

    return report


def _refuse_packed(source: Path) -> None:
    """Raise ``ModelError`` if ``source`` is an `.ecz` file already or cannot be read."""
    try:
        with source.open("rb") as handle:
            packed = is_ecz(handle)
    except OSError as error:
        raise ModelError(f"cannot read {source}: {error.strerror or error}", hint="check the path") from None
    if packed:
        raise ModelError(
            f"{source}: not an ONNX file: it is an .ecz file", hint="edgecompress unpack restores the model"
        )


def _write_payloads(state: _State, source: Source, progress: Callable[[int], None]) -> tuple[list[Cut], int]:
    """Write the streams of a file's large tensors; return its parts in order and its CRC-32."""
    cuts: list[Cut] = []
    crc = 0
    at = 0
    with _open(source.path) as handle:
        for payload in source.payloads:
            size = payload.end - payload.start
            if size < _SKELETON_BYTES:
                continue
            if payload.start > at:
                cuts.append(Cut(payload.start - at, data=_read(handle, source, at, payload.start)))
                crc = zlib.crc32(cuts[-1].data, crc)
            for start, end in _chunks(payload):
                data = _read(handle, source, start, end)
                crc = zlib.crc32(data, crc)
                cuts.append(_store(state, payload, data))
                progress(end)
            at = payload.end
        cuts.append(Cut(source.size - at, data=_read(handle, source, at, source.size)))
        crc = zlib.crc32(cuts[-1].data, crc)
        progress(source.size)
        if os.fstat(handle.fileno()).st_size != source.size:
            raise _changed(source)
    return cuts, crc


def _open(path: Path) -> BinaryIO:
    """Open an input file unbuffered."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None


def _read(handle: BinaryIO, source: Source, start: int, end: int) -> bytes:
    """Return bytes ``start`` to ``end`` of a source."""
    data = os.pread(handle.fileno(), end - start, start)
    if len(data) != end - start:
        raise _changed(source)
    return data


def _changed(source: Source) -> ModelError:
    """Return the error for a file that became longer or shorter."""
    return ModelError(f"{source.path}: the file changed while it was read", hint="try again when nothing writes to it")


def _chunks(payload: Payload) -> Iterator[tuple[int, int]]:
    """Cut a payload into ranges of at most ``_CHUNK_BYTES``, between two rows if these are not longer."""
    row = math.prod(payload.dims[1:]) * payload.width
    step = _CHUNK_BYTES // row * row if 0 < row <= _CHUNK_BYTES else _CHUNK_BYTES
    for start in range(payload.start, payload.end, step):
        yield start, min(start + step, payload.end)


def _store(state: _State, payload: Payload, data: bytes) -> Cut:
    """Put a piece of a tensor into a stream of its own, or into a group."""
    if payload.end - payload.start >= _OWN_STREAM_BYTES:
        shape = _shape(payload, len(data))
        number, stored = _write_copy(state, payload, data), 0
        if number is None:
            number, stored = _write_stream(state, code_stream(data, payload.width, state.tables, shape))
            if not state.streams[number].is_raw:
                state.known.setdefault(_key(payload.width, data), number)
        state.tensors.append((payload, stored, None))
        return Cut(len(data), stream=number)
    kind = payload.data_type, payload.width
    group = state.open_groups.get(kind)
    if group is None or group.size > _CHUNK_BYTES:
        group = state.open_groups[kind] = Group(payload.width)
        state.groups.append(group)
    group.parts.append(data)
    group.size += len(data)
    state.tensors.append((payload, 0, group))
    return Cut(len(data), data=data, group=group)


def _shape(payload: Payload, size: int) -> tuple[int, int] | None:
    """Return rows and columns of ``size`` bytes of a tensor: its first two dims, the second being 1 if there is one."""
    if not payload.dims:
        return None
    columns = payload.dims[1] if len(payload.dims) > 1 else 1
    row = math.prod(payload.dims[1:]) * payload.width
    return (size // row, columns) if size % row == 0 else None


def _key(width: int, data: bytes) -> bytes:
    """Return what tells tensors apart."""
    return bytes([width]) + hashlib.sha256(data).digest()


def _write_copy(state: _State, payload: Payload, data: bytes) -> int | None:
    """Write that ``data`` is, or transposed is, what a stream has, and return its number; None if no stream has it."""
    source, rows = state.known.get(_key(payload.width, data)), 1
    shape = _shape(payload, len(data))
    if source is None and len(payload.dims) == 2 and shape is not None and min(shape) > 1:
        matrix = np.frombuffer(data, np.uint8).reshape(*shape, payload.width)
        source, rows = state.known.get(_key(payload.width, matrix.transpose(1, 0, 2).tobytes())), shape[1]
    if source is None:
        return None
    # A copy counts the elements of its source, which may have other widths than the tensor.
    copied = state.streams[source]
    if rows > 1 and copied.width != payload.width:
        return None
    state.streams.append(Entry(copied.count, 0, (), 0, (source, rows)))
    return len(state.streams) - 1


def _write_stream(state: _State, coded: Coded) -> tuple[int, int]:
    """Write a stream; return its number and its size. What could not be coded joins such a stream before it."""
    state.out.write(coded.blob)
    size = len(coded.blob)
    last = state.streams[-1] if state.streams else None
    if last and coded.is_raw and last.is_raw and last.count + size <= _CHUNK_BYTES:
        last.count += size
        last.planes = (Plane(Mode.RAW, last.count),)
        last.crc = zlib.crc32(coded.blob, last.crc)
    else:
        state.streams.append(Entry(coded.count, coded.width, coded.planes, zlib.crc32(coded.blob)))
    return len(state.streams) - 1, size


def _write_groups(state: _State) -> None:
    """Write the groups of small tensors that are smaller in planes than deflated with the skeleton."""
    for group in state.groups:
        raw = b"".join(group.parts)
        before = len(state.tables.entries)
        coded = code_stream(raw, group.width, state.tables)
        tables = sum(len(table.levels) for table in state.tables.entries[before:])
        overhead = 16 + 4 * group.width + 3 * len(group.parts) + tables
        if len(coded.blob) + overhead < len(deflate(raw)):
            group.stream, group.stored = _write_stream(state, coded)
        else:
            state.tables.cut(before)


def _tensor_bytes(state: _State) -> tuple[TensorBytes, ...]:
    """Return what each tensor takes; the members of a group share its bytes by their size."""
    sizes: dict[tuple[str, int, int], list[int]] = {}
    for payload, stored, group in state.tensors:
        if group is not None and group.stream is None:
            continue
        size = payload.end - payload.start
        share = stored if group is None else round(group.stored * size / group.size)
        sizes.setdefault((payload.name, payload.start, size), [0])[0] += share
    return tuple(TensorBytes(name, size, stored) for (name, _, size), (stored,) in sizes.items() if name)
