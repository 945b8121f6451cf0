"""Reading and checking the structure of an `.ecz` file (container/SPEC.md). Nothing is decoded here but the meta block.

Every count is bounded by bytes that are present, or by a limit of the format, before anything of that size is
allocated. Whatever the bytes, the result is a ``Container`` whose numbers agree with each other, or a ``FormatError``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgecompress.errors import FormatError, ModelError
from edgecompress.runtime.layout import (
    CRC_OFFSET,
    DEFLATE_MAX_RATIO,
    MAGIC,
    MAX_CODE_LENGTH,
    MAX_FILES,
    MAX_LANE_SYMBOLS,
    MAX_PIECES,
    MAX_STREAM_BYTES,
    MIN_LANE_SYMBOLS,
    PREFIX,
    SYMBOL_BITS,
    VERSION,
    WIDTHS,
    Container,
    FileEntry,
    Mode,
    Plane,
    Segment,
    Stream,
    is_plain_name,
    meta_limit,
)

Array = npt.NDArray[Any]

_REPACK = "the file is damaged or was not written by edgecompress; copy it again or pack the model again"


def malformed(what: str) -> FormatError:
    """Return the error for a malformed file; ``what`` says where it is wrong."""
    return FormatError(f"malformed .ecz file: {what}", hint=_REPACK)


def is_ecz(handle: BinaryIO) -> bool:
    """Return whether the file starts like an `.ecz` file; the position is restored."""
    position = handle.tell()
    start = handle.read(len(MAGIC))
    handle.seek(position)
    return start == MAGIC


@contextmanager
def open_ecz(path: Path) -> Iterator[BinaryIO]:
    """Open ``path``; put its name before the message of any ``FormatError`` raised inside.

    Raises ``ModelError`` where the file cannot be read or memory ends.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None
    with handle:
        try:
            yield handle
        except FormatError as error:
            raise FormatError(f"{path}: {error.message}", hint=error.hint) from None
        except MemoryError:
            raise ModelError(f"{path}: not enough memory to decode it", hint="use a machine with more memory") from None


def read_container(handle: BinaryIO) -> Container:
    """Read and check everything but the payload streams of the open file. Raises ``FormatError``."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    prefix = handle.read(PREFIX.size)
    if not prefix.startswith(MAGIC):
        kind = "it is empty" if not prefix else "it does not start with the .ecz signature"
        raise FormatError(f"not an .ecz file: {kind}", hint="make one with: edgecompress pack MODEL.onnx -o MODEL.ecz")
    if len(prefix) < PREFIX.size:
        raise malformed(f"truncated, {size} bytes are less than the prefix")
    _, version, crc, offset, stored, raw = PREFIX.unpack(prefix)
    if version != VERSION:
        raise FormatError(
            f"the .ecz format version {version} is not known, this reader knows {VERSION}", hint="update edgecompress"
        )
    if offset < PREFIX.size or offset + stored != size:
        raise malformed(f"truncated or extended, {offset + stored} bytes are announced and {size} are there")
    if raw > meta_limit(stored, size):
        raise malformed(f"the meta block claims {raw} bytes")
    handle.seek(offset)
    meta = handle.read(stored)
    if zlib.crc32(meta, zlib.crc32(prefix[:CRC_OFFSET] + bytes(4) + prefix[CRC_OFFSET + 4 :])) != crc:
        raise malformed("checksum mismatch in the meta block")
    return _parse_meta(inflate(meta, raw), payload_end=offset)


def inflate(data: bytes | memoryview, length: int) -> bytes:
    """Return exactly ``length`` bytes of a raw DEFLATE stream that uses up ``data``; never allocates more."""
    engine = zlib.decompressobj(-15)
    try:
        out = engine.decompress(data, length + 1)
    except zlib.error:
        raise malformed("broken DEFLATE data") from None
    if len(out) != length or not engine.eof or engine.unused_data or engine.unconsumed_tail:
        raise malformed("DEFLATE data of another length than announced")
    return out


def _parse_meta(meta: bytes, *, payload_end: int) -> Container:
    """Parse the inflated meta block."""
    lane_symbols, at = _number(meta, 0)
    if not MIN_LANE_SYMBOLS <= lane_symbols <= MAX_LANE_SYMBOLS:
        raise malformed(f"{lane_symbols} symbols a lane")
    stream_count, at = _count(meta, at, MAX_PIECES, "streams")
    room = MAX_PIECES - stream_count
    streams = []
    offset = PREFIX.size
    for _ in range(stream_count):
        stream, at = _parse_stream(meta, at, offset)
        offset += stream.stored_bytes
        if offset > payload_end:
            raise malformed("streams reach into the meta block")
        streams.append(stream)
    if offset != payload_end:
        raise malformed("bytes between the streams and the meta block")
    left = [stream.raw_bytes for stream in streams]
    file_count, at = _count(meta, at, MAX_FILES, "files")
    files = []
    for index in range(file_count):
        entry, at = _parse_file(meta, at, left, room, is_model=index == 0)
        room -= len(entry.segments)
        files.append(entry)
    _check_files(files, left)
    skeleton = meta[at:]
    gaps = sum(entry.length - sum(s.length for s in entry.segments) for entry in files)
    if gaps != len(skeleton):
        raise malformed(f"the skeleton has {len(skeleton)} bytes instead of {gaps}")
    return Container(lane_symbols, tuple(streams), tuple(files), skeleton)


def _parse_stream(meta: bytes, at: int, offset: int) -> tuple[Stream, int]:
    """Parse one entry of the stream table; ``offset`` is where its bytes start."""
    count, at = _number(meta, at)
    width, at = _number(meta, at)
    if width not in WIDTHS or not 1 <= count * width <= MAX_STREAM_BYTES:
        raise malformed(f"a stream of {count} elements of {width} bytes")
    planes = []
    for _ in range(width):
        plane, at = _parse_plane(meta, at, count)
        planes.append(plane)
    crc, at = _fixed32(meta, at)
    return Stream(count, width, offset, crc, tuple(planes)), at


def _parse_plane(meta: bytes, at: int, count: int) -> tuple[Plane, int]:
    """Parse one plane of a stream of ``count`` elements."""
    mode, at = _number(meta, at)
    stored, at = _number(meta, at)
    if mode == Mode.RAW and stored == count:
        return Plane(Mode.RAW, stored), at
    if mode == Mode.DEFLATE and DEFLATE_MAX_RATIO * stored >= count:
        return Plane(Mode.DEFLATE, stored), at
    if mode == Mode.HUFFMAN:
        symbol_bits, at = _number(meta, at)
        base, at = _number(meta, at)
        if (
            symbol_bits not in SYMBOL_BITS or base > 255 or 64 * stored < count * symbol_bits
        ):  # a code has a bit at least
            raise malformed(f"a plane of {stored} bytes for {count} symbols of {symbol_bits} bits")
        lengths, at = _parse_lengths(meta, at)
        return Plane(Mode.HUFFMAN, stored, lengths, symbol_bits, base), at
    raise malformed(f"a plane of mode {mode} with {stored} bytes for {count} symbols")


def _parse_lengths(meta: bytes, at: int) -> tuple[Array, int]:
    """Parse a table of code lengths, two a byte, and check that they are a complete prefix code."""
    alphabet, at = _number(meta, at)
    if not 2 <= alphabet <= 256:
        raise malformed(f"an alphabet of {alphabet} symbols")
    nibbles = np.frombuffer(_take(meta, at, (alphabet + 1) // 2), np.uint8)
    lengths = np.stack([nibbles & 15, nibbles >> 4], axis=1).reshape(-1)
    used = lengths[lengths > 0].astype(np.int64)
    if lengths[alphabet:].any() or used.max(initial=0) > MAX_CODE_LENGTH:
        raise malformed("code lengths out of range")
    if int((1 << (MAX_CODE_LENGTH - used)).sum()) != 1 << MAX_CODE_LENGTH or used.size < 2:
        raise malformed("code lengths that are no complete prefix code")
    return lengths[:alphabet], at + nibbles.size


def _parse_file(meta: bytes, at: int, left: list[int], room: int, *, is_model: bool) -> tuple[FileEntry, int]:
    """Parse one entry of the file table, of at most ``room`` segments.

    Takes what its segments use from ``left``, the bytes left of each stream.
    """
    size, at = _number(meta, at)
    raw_name = _take(meta, at, size)
    at += size
    name = "" if is_model and not raw_name else _check_name(raw_name, is_model=is_model)
    length, at = _number(meta, at)
    if not length and not is_model:
        raise malformed(f"the file {name!r} is empty")
    crc, at = _fixed32(meta, at)
    segment_count, at = _count(meta, at, room, "more segments")
    segments = []
    end = 0
    for _ in range(segment_count):
        gap, at = _number(meta, at)
        size, at = _number(meta, at)
        stream, at = _number(meta, at)
        if stream >= len(left) or not 1 <= size <= left[stream]:
            raise malformed(f"a segment of {size} bytes of stream {stream}")
        left[stream] -= size
        end += gap + size
        segments.append(Segment(gap, size, stream))
    if end > length:
        raise malformed("segments that reach beyond the end of their file")
    return FileEntry(name, length, crc, tuple(segments)), at


def _check_name(raw: bytes, *, is_model: bool) -> str:
    """Return the name of an external file, which must be plain: it may not lead out of the folder."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise malformed("a file name that is not UTF-8") from None
    if is_model or not is_plain_name(name):
        raise malformed(f"the file name {name!r}")
    return name


def _check_files(files: list[FileEntry], left: list[int]) -> None:
    """Check the file table as a whole."""
    if not files:
        raise malformed("no model in it")
    if any(left):
        raise malformed("payload that no file uses")
    if len({entry.name for entry in files}) < len(files):
        raise malformed("two files of one name")


def _take(meta: bytes, at: int, size: int) -> bytes:
    """Return ``size`` bytes from ``at``."""
    if size > len(meta) - at:
        raise malformed("the meta block ends too early")
    return meta[at : at + size]


def _fixed32(meta: bytes, at: int) -> tuple[int, int]:
    """Read a little-endian 32-bit number."""
    return int.from_bytes(_take(meta, at, 4), "little"), at + 4


def _count(meta: bytes, at: int, limit: int, what: str) -> tuple[int, int]:
    """Read how many of something follow, at most ``limit``."""
    count, at = _number(meta, at)
    if count > limit:
        raise malformed(f"{count} {what}, at most {limit} are allowed")
    return count, at


def _number(meta: bytes, at: int) -> tuple[int, int]:
    """Read a number of 7 bits a byte, lowest first, below 2**63."""
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(meta):
            raise malformed("the meta block ends too early")
        byte = meta[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise malformed("a number of more than 63 bits")
