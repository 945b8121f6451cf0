"""The meta block of an `.ecz` file: which bytes of which file are stored where (SPEC.md)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from edgecompress.container.planes import LANE_SYMBOLS, deflate
from edgecompress.errors import ModelError
from edgecompress.runtime.layout import CRC_OFFSET, MAGIC, MAX_META_BYTES, PREFIX, VERSION, Mode, Plane

if TYPE_CHECKING:
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
    """Write the meta block and the prefix; return the size of the file."""
    meta = bytearray(_number(LANE_SYMBOLS))
    meta += _number(len(streams))
    for entry in streams:
        meta += _stream_entry(entry)
    meta += _number(len(files))
    skeleton: list[bytes] = []
    for source, cuts, crc in files:
        meta += _file_entry(source, cuts, crc, skeleton)
    raw = bytes(meta) + b"".join(skeleton)
    if len(raw) > MAX_META_BYTES:
        raise ModelError(
            f"{files[0][0].path}: {len(raw)} bytes of it are no weights, the format holds {MAX_META_BYTES}",
            hint="this model cannot be packed",
        )
    stored = deflate(raw)
    offset = out.tell()
    out.write(stored)
    prefix = bytearray(PREFIX.pack(MAGIC, VERSION, 0, offset, len(stored), len(raw)))
    prefix[CRC_OFFSET : CRC_OFFSET + 4] = zlib.crc32(stored, zlib.crc32(prefix)).to_bytes(4, "little")
    out.seek(0)
    out.write(prefix)
    return offset + len(stored)


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
        stream = cut.group.stream if cut.group else cut.stream
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
