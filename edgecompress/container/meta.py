"""The meta block of an `.ecz` file: which bytes of which file are stored where (SPEC.md)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from edgecompress.container.planes import deflate
from edgecompress.container.tables import LANE_PHRASES
from edgecompress.errors import ModelError
from edgecompress.runtime.layout import (
    CRC_OFFSET,
    LONG_PHRASES,
    MAGIC,
    MAX_FILES,
    MAX_META_BYTES,
    MAX_PIECES,
    PHRASE_VALUES,
    PREFIX,
    VERSION,
    Mode,
    Plane,
    Table,
    meta_limit,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgecompress.container.sources import Source


@dataclass
class Entry:
    """A stream that was written; raw ones grow. A copy has no planes, but a source and its rows."""

    count: int
    width: int
    planes: tuple[Plane, ...]
    crc: int
    copy_of: tuple[int, int] | None = None

    @property
    def is_raw(self) -> bool:
        """Return whether the bytes are stored as they are."""
        return self.copy_of is None and self.width == 1 and self.planes[0].mode == Mode.RAW


@dataclass
class Group:
    """Small tensors of one type, coded together at the end; ``stream`` is None if they stay in the skeleton."""

    width: int
    parts: list[bytes] = field(default_factory=list)
    size: int = 0
    stream: int | None = None
    stored: int = 0


@dataclass
class Cut:
    """A part of a file in order: bytes of the skeleton, of a group, or (without ``data``) of a stream."""

    length: int
    data: bytes = b""
    group: Group | None = None
    stream: int | None = None


def write_meta(
    out: BinaryIO, streams: list[Entry], tables: Sequence[Table], files: list[tuple[Source, list[Cut], int]]
) -> int:
    """Write the meta block and the prefix; return the size of the file.

    Raises ``ModelError`` where the model has more of something than the format allows.
    """
    model = files[0][0].path
    _check_counts(model, streams, files)
    meta = bytearray(_number(LANE_PHRASES))
    meta += _number(len(tables)) + b"".join(_table_entry(table) for table in tables)
    meta += _number(len(streams)) + b"".join(_stream_entry(entry, tables) for entry in streams)
    meta += _number(len(files))
    skeleton: list[bytes] = []
    for source, cuts, crc in files:
        meta += _file_entry(source, cuts, crc, skeleton)
    raw = bytes(meta) + b"".join(skeleton)
    _check_limit(model, "bytes outside of its weights", len(raw), MAX_META_BYTES)
    stored = _deflate_parts(raw, len(meta))
    offset = out.tell()
    _check_limit(model, "bytes outside of its weights", len(raw), meta_limit(len(stored), offset + len(stored)))
    out.write(stored)
    prefix = bytearray(PREFIX.pack(MAGIC, VERSION, 0, offset, len(stored), len(raw)))
    prefix[CRC_OFFSET : CRC_OFFSET + 4] = zlib.crc32(stored, zlib.crc32(prefix)).to_bytes(4, "little")
    out.seek(0)
    out.write(prefix)
    return offset + len(stored)


def _deflate_parts(raw: bytes, first: int) -> bytes:
    """Return ``raw`` deflated, with codes of their own for its ``first`` bytes if that is smaller."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    parts = engine.compress(raw[:first]) + engine.flush(zlib.Z_BLOCK) + engine.compress(raw[first:]) + engine.flush()
    return min(parts, deflate(raw), key=len)


def _check_counts(model: Path, streams: list[Entry], files: list[tuple[Source, list[Cut], int]]) -> None:
    """Raise ``ModelError`` where a reader would refuse the number of streams, segments or files."""
    segments = sum(_stream_of(cut) is not None for _, cuts, _ in files for cut in cuts)
    blocks = sum(len(plane.blocks) for entry in streams for plane in entry.planes)
    _check_limit(model, "pieces of weights", len(streams) + blocks + segments, MAX_PIECES)
    _check_limit(model, "files", len(files), MAX_FILES)


def _check_limit(model: Path, what: str, count: int, limit: int) -> None:
    """Raise ``ModelError`` where ``count`` is above ``limit``."""
    if count > limit:
        raise ModelError(
            f"{model}: it has {count} {what}, an .ecz file holds at most {limit}",
            hint="this model cannot be packed; if it has its data in many files, save it with all of it in one",
        )


def _stream_of(cut: Cut) -> int | None:
    """Return the stream that holds a part of a file, None if that is the skeleton."""
    return cut.group.stream if cut.group else cut.stream


def _table_entry(table: Table) -> bytes:
    """Return the entry of a table in the meta block."""
    head = _number(table.base) + _number(len(table.levels)) + _number(table.splits)
    common = table.common + (LONG_PHRASES if table.longest > PHRASE_VALUES else 0)
    return head + (_number(common) if table.splits else b"") + table.levels


def _stream_entry(entry: Entry, tables: Sequence[Table]) -> bytes:
    """Return the entry of a stream in the meta block."""
    if entry.copy_of is not None:
        return _number(entry.count) + _number(0) + b"".join(_number(number) for number in entry.copy_of)
    out = _number(entry.count) + _number(entry.width)
    for plane in entry.planes:
        out += _number(plane.mode)
        out += _huffman_entry(plane, tables) if plane.mode == Mode.HUFFMAN else _number(plane.stored_bytes)
    return out + entry.crc.to_bytes(4, "little")


def _huffman_entry(plane: Plane, tables: Sequence[Table]) -> bytes:
    """Return what the entry of a Huffman plane has after its mode."""
    classes = plane.class_map
    out = _number(1)
    if classes is not None:
        out = _number(classes.classes) + _number(len(classes.rows)) + _number(len(classes.columns))
        out += classes.rows + classes.columns
    for block in plane.blocks:
        out += _number(block.table) + _number(block.stored_bytes)
        if tables[block.table].splits:
            out += _number(block.phrases)
    return out


def _file_entry(source: Source, cuts: list[Cut], crc: int, skeleton: list[bytes]) -> bytes:
    """Return the entry of a file in the meta block; its part of the skeleton goes to ``skeleton``."""
    segments = bytearray()
    count = 0
    gap = 0
    for cut in cuts:
        stream = _stream_of(cut)
        if stream is None:
            skeleton.append(cut.data)
            gap += cut.length
        else:
            segments += _number(gap) + _number(cut.length) + _number(stream)
            count += 1
            gap = 0
    name = source.name.encode("utf-8")
    return _number(len(name)) + name + _number(source.size) + crc.to_bytes(4, "little") + _number(count) + segments


def _number(value: int) -> bytes:
    """Return ``value`` as 7 bits a byte, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
