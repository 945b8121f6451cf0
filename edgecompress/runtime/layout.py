"""What an `.ecz` file consists of (container/SPEC.md): its limits and the values that reader and writer share."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"\x89ECZ\r\n\x1a\n"
VERSION = 2
PREFIX = struct.Struct("<8sIIQII")  # magic, version, CRC-32, meta offset, meta stored length, meta raw length
CRC_OFFSET = 12

MAX_META_BYTES = 1 << 28
SMALL_META_BYTES = 1 << 26  # what any file may have; beyond, the file must be large itself
META_MAX_RATIO = 8  # of a larger meta block, inflated, to the file
MAX_PIECES = 1 << 18  # streams, blocks and segments together
MAX_FILES = 1 << 12
MAX_TABLES = 1 << 10
MAX_STREAM_BYTES = 1 << 26
MAX_LEVEL = 128
MAX_CODE_LENGTH = 12
MAX_PHRASES = 1 << 8
PHRASE_VALUES = 8  # the most of a phrase
LONG_PHRASE_VALUES = 64  # in tables that say so
LONG_PHRASES = 256  # what a table that says so adds to its common level
MAX_CLASSES = 8
MAX_CLASS_LEVEL = 15
CLASS_BIAS = 8
MIN_LANE_PHRASES = 64
MAX_LANE_PHRASES = 1 << 12
WIDTHS = (1, 2, 4, 8)
DEFLATE_MAX_RATIO = 1032  # 258 bytes for two bits, the most that RFC 1951 can express

# Of code points: the two separators, what controls a terminal, what is invisible or turns text around, lone surrogates.
_NOT_IN_NAMES = (
    (0x00, 0x1F),
    (0x2F, 0x2F),
    (0x5C, 0x5C),
    (0x7F, 0x9F),
    (0x200B, 0x200F),
    (0x2028, 0x202E),
    (0x2060, 0x206F),
    (0xD800, 0xDFFF),
    (0xFEFF, 0xFEFF),
)


class Mode(IntEnum):
    """How the bytes of a plane are stored."""

    RAW = 0
    HUFFMAN = 1
    DEFLATE = 2


@dataclass(frozen=True, slots=True)
class Table:
    """A code, by the levels of the values from ``base`` on: how likely they are, 0: never.

    Phrases are split ``splits`` times, by the values of at least level ``common`` (0 without splits), but none gets
    more than ``longest`` values, 8 or 64.
    """

    base: int
    levels: bytes
    splits: int
    common: int
    longest: int = PHRASE_VALUES


@dataclass(frozen=True, slots=True)
class Block:
    """``count`` bytes in ``phrases`` codes of table number ``table``."""

    table: int
    count: int
    phrases: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class ClassMap:
    """Which of ``classes`` each run of a plane is in, by the levels of its row and of its column, one byte each."""

    classes: int
    rows: bytes
    columns: bytes

    def class_sizes(self) -> list[int]:
        """Return how many runs each class has."""
        sizes = [0] * self.classes
        across = Counter(self.columns).items()
        for row, rows in Counter(self.rows).items():
            for column, columns in across:
                sizes[min(max(row + column - CLASS_BIAS, 0), self.classes - 1)] += rows * columns
        return sizes


@dataclass(frozen=True, slots=True)
class Plane:
    """One byte of every element of a stream; in Huffman mode cut into one block per class."""

    mode: Mode
    stored_bytes: int
    blocks: tuple[Block, ...] = ()
    class_map: ClassMap | None = None


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
class Copy:
    """The elements of stream number ``source``, read as a matrix of ``rows`` rows and transposed (1: as they are)."""

    source: int
    rows: int
    raw_bytes: int

    @property
    def stored_bytes(self) -> int:
        """Return the bytes that a copy occupies."""
        return 0


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

    lane_phrases: int
    tables: tuple[Table, ...]
    streams: tuple[Stream | Copy, ...]
    files: tuple[FileEntry, ...]
    skeleton: bytes


def meta_limit(stored: int, file_bytes: int) -> int:
    """Return the most bytes that ``stored`` bytes of meta block may inflate to in a file of ``file_bytes``."""
    return min(MAX_META_BYTES, DEFLATE_MAX_RATIO * stored, max(SMALL_META_BYTES, META_MAX_RATIO * file_bytes))


def is_plain_name(name: str) -> bool:
    """Return whether ``name`` names a file in its folder that is not hidden, and nothing else."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= 255
        and not name.startswith(".")
        and not any(low <= ord(letter) <= high for letter in name for low, high in _NOT_IN_NAMES)
    )
