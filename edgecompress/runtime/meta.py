"""Parsing the inflated meta block of an `.ecz` file, in the order of the checks of container/SPEC.md.

Every count is bounded by bytes that are present, or by a limit of the format, before anything of that size is
allocated.
"""

from __future__ import annotations

from edgecompress.errors import FormatError
from edgecompress.runtime.codes import most_splits
from edgecompress.runtime.layout import (
    DEFLATE_MAX_RATIO,
    LONG_PHRASE_VALUES,
    LONG_PHRASES,
    MAX_CLASS_LEVEL,
    MAX_CLASSES,
    MAX_FILES,
    MAX_LANE_PHRASES,
    MAX_LEVEL,
    MAX_PIECES,
    MAX_STREAM_BYTES,
    MAX_TABLES,
    MIN_LANE_PHRASES,
    PHRASE_VALUES,
    PREFIX,
    WIDTHS,
    Block,
    ClassMap,
    Container,
    Copy,
    FileEntry,
    Mode,
    Plane,
    Segment,
    Stream,
    Table,
    is_plain_name,
)

_REPACK = "the file is damaged or was not written by edgecompress; copy it again or pack the model again"


def malformed(what: str) -> FormatError:
    """Return the error for a malformed file; ``what`` says where it is wrong."""
    return FormatError(f"malformed .ecz file: {what}", hint=_REPACK)


class _Reader:
    """The meta block and a position in it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes."""
        if size > len(self.data) - self.at:
            raise malformed("the meta block ends too early")
        self.at += size
        return self.data[self.at - size : self.at]

    def fixed32(self) -> int:
        """Read a little-endian 32-bit number."""
        return int.from_bytes(self.take(4), "little")

    def number(self) -> int:
        """Read a number of 7 bits a byte, lowest first, below 2**63."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise malformed("a number of more than 63 bits")

    def count(self, limit: int, what: str) -> int:
        """Read how many of something follow, at most ``limit``."""
        count = self.number()
        if count > limit:
            raise malformed(f"{count} {what}, at most {limit} are allowed")
        return count


def parse_meta(meta: bytes, *, payload_end: int, file_bytes: int) -> Container:
    """Parse the inflated meta block of a file of ``file_bytes`` whose streams end at ``payload_end``."""
    reader = _Reader(meta)
    lane_phrases = reader.number()
    if not MIN_LANE_PHRASES <= lane_phrases <= MAX_LANE_PHRASES:
        raise malformed(f"{lane_phrases} phrases a lane")
    tables = tuple(_parse_table(reader) for _ in range(reader.count(MAX_TABLES, "tables")))
    streams, room = _parse_streams(reader, tables, payload_end)
    left = [stream.raw_bytes for stream in streams]
    files: list[FileEntry] = []
    for index in range(reader.count(MAX_FILES, "files")):
        files.append(_parse_file(reader, left, room, is_model=index == 0))
        room -= len(files[-1].segments)
    _check_files(files, left, DEFLATE_MAX_RATIO * file_bytes)
    skeleton = meta[reader.at :]
    gaps = sum(entry.length - sum(s.length for s in entry.segments) for entry in files)
    if gaps != len(skeleton):
        raise malformed(f"the skeleton has {len(skeleton)} bytes instead of {gaps}")
    return Container(lane_phrases, tables, streams, tuple(files), skeleton)


def _parse_table(reader: _Reader) -> Table:
    """Parse the levels of the values of a code."""
    base = reader.number()
    alphabet = reader.number()
    if base > 255 or not 2 <= alphabet <= 256:
        raise malformed(f"an alphabet of {alphabet} values from {base} on")
    splits = reader.number()
    common = reader.number() if splits else 0
    levels = reader.take(alphabet)
    used = alphabet - levels.count(0)
    if used < 2 or max(levels) > MAX_LEVEL:
        raise malformed("levels out of range")
    longest = PHRASE_VALUES
    if common >= LONG_PHRASES:
        common, longest = common - LONG_PHRASES, LONG_PHRASE_VALUES
    many = sum(level >= common for level in levels) if common else 0
    if splits > most_splits(used, many, longest):
        raise malformed(f"{splits} splits of {used} values by {many} common ones")
    return Table(base, levels, splits, common, longest)


def _parse_streams(
    reader: _Reader, tables: tuple[Table, ...], payload_end: int
) -> tuple[tuple[Stream | Copy, ...], int]:
    """Parse the stream table and return how many pieces may still come.

    The streams lie one after the other up to ``payload_end``.
    """
    streams: list[Stream | Copy] = []
    offset = PREFIX.size
    count = reader.count(MAX_PIECES, "streams")
    room = MAX_PIECES - count
    for _ in range(count):
        elements = reader.number()
        width = reader.number()
        if width == 0:
            streams.append(_parse_copy(reader, elements, streams))
            continue
        if width not in WIDTHS or not 1 <= elements * width <= MAX_STREAM_BYTES:
            raise malformed(f"a stream of {elements} elements of {width} bytes")
        planes = tuple(_parse_plane(reader, elements, tables) for _ in range(width))
        streams.append(Stream(elements, width, offset, reader.fixed32(), planes))
        offset += streams[-1].stored_bytes
        room -= sum(len(plane.blocks) for plane in planes)
        if offset > payload_end:
            raise malformed("streams reach into the meta block")
        if room < 0:
            raise malformed(f"more than {MAX_PIECES} streams and blocks")
    if offset != payload_end:
        raise malformed("bytes between the streams and the meta block")
    return tuple(streams), room


def _parse_copy(reader: _Reader, count: int, streams: list[Stream | Copy]) -> Copy:
    """Parse a stream of ``count`` elements that repeats one of ``streams``, the ones before it."""
    number = reader.number()
    rows = reader.number()
    source = streams[number] if number < len(streams) else None
    if not isinstance(source, Stream) or source.count != count or not 1 <= rows <= count or count % rows:
        raise malformed(f"a copy of stream {number} with {count} elements in {rows} rows")
    return Copy(number, rows, source.raw_bytes)


def _parse_plane(reader: _Reader, count: int, tables: tuple[Table, ...]) -> Plane:
    """Parse one plane of a stream of ``count`` elements."""
    mode = reader.number()
    if mode == Mode.HUFFMAN:
        return _parse_huffman(reader, count, tables)
    stored = reader.number()
    if mode == Mode.RAW and stored == count:
        return Plane(Mode.RAW, stored)
    if mode == Mode.DEFLATE and DEFLATE_MAX_RATIO * stored >= count:
        return Plane(Mode.DEFLATE, stored)
    raise malformed(f"a plane of mode {mode} with {stored} bytes for {count} values")


def _parse_huffman(reader: _Reader, count: int, tables: tuple[Table, ...]) -> Plane:
    """Parse a Huffman plane: a block of all values, or the map of their classes and a block for each class."""
    classes = reader.number()
    if not 1 <= classes <= MAX_CLASSES:
        raise malformed(f"{classes} classes of values")
    sizes = [count]
    class_map = None
    if classes > 1:
        rows, columns = reader.number(), reader.number()
        if not 1 <= rows * columns <= count or count % (rows * columns):
            raise malformed(f"{rows} rows and {columns} columns of {count} values")
        class_map = ClassMap(classes, reader.take(rows), reader.take(columns))
        if max(class_map.rows) > MAX_CLASS_LEVEL or max(class_map.columns) > MAX_CLASS_LEVEL:
            raise malformed("classes of rows or columns out of range")
        run = count // (rows * columns)
        sizes = [run * runs for runs in class_map.class_sizes()]
    blocks = tuple(_parse_block(reader, size, tables) for size in sizes if size)
    return Plane(Mode.HUFFMAN, sum(block.stored_bytes for block in blocks), blocks, class_map)


def _parse_block(reader: _Reader, count: int, tables: tuple[Table, ...]) -> Block:
    """Parse a block of ``count`` values."""
    number = reader.number()
    if number >= len(tables):
        raise malformed(f"a block of table {number} of {len(tables)}")
    table = tables[number]
    stored = reader.number()
    phrases = reader.number() if table.splits else count
    size = table.longest if table.splits else 1
    # A code has 1 to 12 bits; the lengths of lanes take more.
    if not (phrases <= min(count, 8 * stored) and size * phrases >= count):
        raise malformed(f"a block of {count} values in {phrases} phrases and {stored} bytes")
    return Block(number, count, phrases, stored)


def _parse_file(reader: _Reader, left: list[int], room: int, *, is_model: bool) -> FileEntry:
    """Parse one entry of the file table, of at most ``room`` segments.

    Takes what its segments use from ``left``, the bytes left of each stream.
    """
    raw_name = reader.take(reader.number())
    name = "" if is_model and not raw_name else _check_name(raw_name, is_model=is_model)
    length = reader.number()
    if not length and not is_model:
        raise malformed(f"the file {name!r} is empty")
    crc = reader.fixed32()
    segments = []
    end = 0
    for _ in range(reader.count(room, "more segments")):
        gap, size, stream = reader.number(), reader.number(), reader.number()
        if stream >= len(left) or not 1 <= size <= left[stream]:
            raise malformed(f"a segment of {size} bytes of stream {stream}")
        left[stream] -= size
        end += gap + size
        segments.append(Segment(gap, size, stream))
    if end > length:
        raise malformed("segments that reach beyond the end of their file")
    return FileEntry(name, length, crc, tuple(segments))


def _check_name(raw: bytes, *, is_model: bool) -> str:
    """Return the name of an external file, which must be plain: it may not lead out of the folder."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise malformed("a file name that is not UTF-8") from None
    if is_model or not is_plain_name(name):
        raise malformed(f"the file name {name!r}")
    return name


def _check_files(files: list[FileEntry], left: list[int], most: int) -> None:
    """Check the file table as a whole; all files together have at most ``most`` bytes."""
    if not files:
        raise malformed("no model in it")
    if any(left):
        raise malformed("payload that no file uses")
    if len({entry.name for entry in files}) < len(files):
        raise malformed("two files of one name")
    total = sum(entry.length for entry in files)
    if total > most:
        raise malformed(f"{total} bytes out of a file that can hold at most {most}")
