"""What an `.ecz` file consists of (container/SPEC.md): its limits and the values that reader and writer share."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]

MAGIC = b"\x89ECZ\r\n\x1a\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQII")  # magic, version, CRC-32, meta offset, meta stored length, meta raw length
CRC_OFFSET = 12

MAX_META_BYTES = 1 << 28
SMALL_META_BYTES = 1 << 26  # what any file may have; beyond, the file must be large itself
META_MAX_RATIO = 8  # of a larger meta block, inflated, to the file
MAX_PIECES = 1 << 18  # streams and segments together
MAX_FILES = 1 << 12
MAX_STREAM_BYTES = 1 << 26
MAX_CODE_LENGTH = 12
MIN_LANE_SYMBOLS = 64
MAX_LANE_SYMBOLS = 1 << 12
WIDTHS = (1, 2, 4, 8)
SYMBOL_BITS = (1, 2, 4, 8)
DEFLATE_MAX_RATIO = 1032  # 258 bytes for two bits, the most that RFC 1951 can express


class Mode(IntEnum):
    """How the bytes of a plane are stored."""

    RAW = 0
    HUFFMAN = 1
    DEFLATE = 2


@dataclass(frozen=True, slots=True)
class Plane:
    """One byte of every element of a stream.

    In Huffman mode each coded symbol holds ``8 / symbol_bits`` bytes, of which ``base`` was subtracted, and ``lengths``
    are the lengths of the codes, (alphabet,) uint8.
    """

    mode: Mode
    stored_bytes: int
    lengths: Array | None = None
    symbol_bits: int = 8
    base: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """``count`` elements of ``width`` bytes, stored as ``width`` planes from ``offset`` on."""

    count: int
    width: int
    offset: int
    crc: int
    planes: tuple[Plane, ...]

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that the planes occupy."""
        return sum(plane.stored_bytes for plane in self.planes)

    @property
    def raw_bytes(self) -> int:
        """Return the bytes that the stream decodes to."""
        return self.count * self.width


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes of stream number ``stream``, placed after ``gap`` bytes of the skeleton."""

    gap: int
    length: int
    stream: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file that comes out: the model first (its name is empty), then its external data."""

    name: str
    length: int
    crc: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Container:
    """A checked `.ecz` file, all but the payload."""

    lane_symbols: int
    streams: tuple[Stream, ...]
    files: tuple[FileEntry, ...]
    skeleton: bytes


def meta_limit(stored: int, file_bytes: int) -> int:
    """Return the most bytes that ``stored`` bytes of meta block may inflate to in a file of ``file_bytes``."""
    return min(MAX_META_BYTES, DEFLATE_MAX_RATIO * stored, max(SMALL_META_BYTES, META_MAX_RATIO * file_bytes))


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` names a file in its folder that is not hidden, and nothing else."""
    return (
        0 < len(name.encode("utf-8")) <= 255
        and not name.startswith(".")
        and name.isprintable()
        and not {"/", "\\"} & set(name)
    )
