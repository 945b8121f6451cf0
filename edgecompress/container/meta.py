"""The meta block of an `.ecz` file: which bytes of which file are stored where (SPEC.md)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgecompress.container.planes import LANE_SYMBOLS, deflate
from edgecompress.errors import ModelError
from edgecompress.runtime.layout import (
    CRC_OFFSET,
    MAGIC,
    MAX_FILES,
    MAX_META_BYTES,
    MAX_PIECES,
    PREFIX,
    VERSION,
    Mode,
    Plane,
    meta_limit,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgecompress.container.sources import Source


@dataclass
class Entry:
    """A stream that was written; raw ones grow."""

    count: int
    width: int
    planes: tuple[Plane, ...]
    crc: int

    @property
    def is_raw(self) -> bool:
        """Return whether the bytes are stored as they are."""
        return self.width == 1 and self.planes[0].mode == Mode.RAW


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


def write_meta(out: BinaryIO, streams: list[Entry], files: list[tuple[Source, list[Cut], int]]) -> int:
    """Write the meta block and the prefix; return the size of the file.

    Raises ``ModelError`` where the model has more of something than the format allows.
    """
    model = files[0][0].path
    _check_counts(model, streams, files)
    meta = bytearray(_number(LANE_SYMBOLS))
    meta += _number(len(streams))
    for entry in streams:
        meta += _stream_entry(entry)
    meta += _number(len(files))
    skeleton: list[bytes] = []
    for source, cuts, crc in files:
        meta += _file_entry(source, cuts, crc, skeleton)
    raw = bytes(meta) + b"".join(skeleton)
    _check_limit(model, "bytes outside of its weights", len(raw), MAX_META_BYTES)
    stored = deflate(raw)
    offset = out.tell()
    _check_limit(model, "bytes outside of its weights", len(raw), meta_limit(len(stored), offset + len(stored)))
    out.write(stored)
    prefix = bytearray(PREFIX.pack(MAGIC, VERSION, 0, offset, len(stored), len(raw)))
    prefix[CRC_OFFSET : CRC_OFFSET + 4] = zlib.crc32(stored, zlib.crc32(prefix)).to_bytes(4, "little")
    out.seek(0)
    out.write(prefix)
    return offset + len(stored)


def _check_counts(model: Path, streams: list[Entry], files: list[tuple[Source, list[Cut], int]]) -> None:
    """Raise ``ModelError`` where a reader would refuse the number of streams, segments or files."""
    segments = sum(_stream_of(cut) is not None for _, cuts, _ in files for cut in cuts)
    _check_limit(model, "pieces of weights", len(streams) + segments, MAX_PIECES)
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


def _stream_entry(entry: Entry) -> bytes:
    """Return the entry of a stream in the meta block."""
    out = _number(entry.count) + _number(entry.width)
    for plane in entry.planes:
        out += _number(plane.mode) + _number(plane.stored_bytes)
        if plane.lengths is not None:
            out += _number(plane.symbol_bits) + _number(plane.base) + _number(plane.lengths.size)
            nibbles = np.append(plane.lengths, np.zeros(plane.lengths.size % 2, np.uint8))
            out += (nibbles[::2] | nibbles[1::2] << 4).tobytes()
    return out + entry.crc.to_bytes(4, "little")


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
