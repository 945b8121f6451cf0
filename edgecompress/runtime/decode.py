"""Decoding the payload of an `.ecz` file with numpy.

Huffman planes are decoded in *lockstep*: one step takes one symbol from every lane, of all planes of a batch, with a
handful of array operations. So the cost of a step is shared by thousands of lanes, or by all small tensors of a model.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from edgecompress.runtime.codes import Code, build_code
from edgecompress.runtime.format import inflate
from edgecompress.runtime.layout import CLASS_BIAS, Block, ClassMap, Container, FileEntry, Mode, Plane, Stream
from edgecompress.runtime.lockstep import bit_windows, decode_lanes, decoding_table
from edgecompress.runtime.meta import malformed

Array = npt.NDArray[Any]

_BATCH_BYTES = 1 << 23  # decoded bytes of the streams that are decoded together
_STREAM_COST = 1 << 14  # what a stream counts at least: the decoding tables of a batch take memory, too
_PIECE = 8  # values of a phrase that are placed at once
_PART_PHRASES = 1 << 15
_BLOCK_LANES = 8192  # lanes in one loop: its work arrays fit the second-level cache


@dataclass(frozen=True)
class _Job:
    """A block to decode: its code, the lengths of its lanes in bits (of the last one at most), and the bit stream."""

    block: Block
    code: Code
    lane_bits: Array
    bits: Array


def read_pieces(handle: BinaryIO, container: Container) -> Iterator[tuple[FileEntry, bytes | memoryview]]:
    """Yield the contents of all files piece by piece, in order, with the file that each piece belongs to.

    Holds the decoded streams of one batch, and those that later segments still need. The checksum of every stream is
    checked before it is decoded, that of a file with its last piece. Raises ``FormatError``.
    """
    skeleton = memoryview(container.skeleton)
    ready: dict[int, memoryview] = {}
    order = deque(dict.fromkeys(s.stream for entry in container.files for s in entry.segments))
    at = 0
    for entry in container.files:
        crc = 0
        done = 0
        for segment in entry.segments:
            if segment.gap:
                piece = skeleton[at : at + segment.gap]
                at += segment.gap
                crc = zlib.crc32(piece, crc)
                yield entry, piece
            if segment.stream not in ready:
                ready |= _read_batch(handle, container, order)
            whole = ready[segment.stream]
            piece, rest = whole[: segment.length], whole[segment.length :]
            if rest:
                ready[segment.stream] = rest
            else:
                del ready[segment.stream]
            crc = zlib.crc32(piece, crc)
            done += segment.gap + segment.length
            yield entry, piece
        piece = skeleton[at : at + entry.length - done]
        at += len(piece)
        if zlib.crc32(piece, crc) != entry.crc:
            raise malformed("checksum mismatch in a decoded file")
        yield entry, piece


def _read_batch(handle: BinaryIO, container: Container, order: deque[int]) -> dict[int, memoryview]:
    """Decode the next streams of ``order``, the first one included, and remove them from it."""
    numbers: list[int] = []
    size = 0
    while order and (not numbers or size < _BATCH_BYTES):
        numbers.append(order.popleft())
        size += max(container.streams[numbers[-1]].raw_bytes, _STREAM_COST)
    sources: dict[int, Stream] = {}
    for number in numbers:
        found = container.streams[number]
        source = number if isinstance(found, Stream) else found.source
        stream = container.streams[source]
        assert isinstance(stream, Stream)
        sources[source] = stream
    blobs = []
    for stream in sources.values():
        handle.seek(stream.offset)
        blob = handle.read(stream.stored_bytes)
        if len(blob) != stream.stored_bytes or zlib.crc32(blob) != stream.crc:
            raise malformed("checksum mismatch in a payload stream")
        blobs.append(blob)
    decoded = dict(zip(sources, decode_streams(list(sources.values()), blobs, container), strict=True))
    return {number: _transposed(container, number, decoded).data for number in numbers}


def _transposed(container: Container, number: int, decoded: dict[int, Array]) -> Array:
    """Return the bytes of stream ``number``, which may be a copy of one in ``decoded``, transposed."""
    found = container.streams[number]
    if isinstance(found, Stream):
        return decoded[number]
    data = decoded[found.source]
    width = cast("Stream", container.streams[found.source]).width
    return data.reshape(found.rows, -1, width).transpose(1, 0, 2).reshape(-1)


def decode_streams(streams: Sequence[Stream], blobs: Sequence[bytes], container: Container) -> list[Array]:
    """Return the raw bytes of each stream as (bytes,) uint8; all blocks are decoded together.

    ``blobs`` are the stored bytes of the streams, which are of ``container``. Raises ``FormatError`` where they do not
    decode.
    """
    outputs = [np.empty((stream.count, stream.width), np.uint8) for stream in streams]
    jobs: list[_Job] = []
    planes: list[tuple[Plane, Array]] = []
    for stream, blob, output in zip(streams, blobs, outputs, strict=True):
        at = 0
        for index, plane in enumerate(stream.planes):
            data = memoryview(blob)[at : at + plane.stored_bytes]
            at += plane.stored_bytes
            if plane.mode == Mode.HUFFMAN:
                jobs += _open_blocks(plane, data, container)
                planes.append((plane, output[:, index]))
            else:
                raw = data if plane.mode == Mode.RAW else inflate(data, stream.count)
                output[:, index] = np.frombuffer(raw, np.uint8)
    decoded = _decode_jobs(jobs, container.lane_phrases)
    for plane, target in planes:
        values = [next(decoded) for _ in plane.blocks]
        target[:] = values[0] if plane.class_map is None else _ordered(plane.class_map, values, target.size)
    return [output.reshape(-1) for output in outputs]


def _ordered(class_map: ClassMap, values: list[Array], count: int) -> Array:
    """Return the ``values`` of the classes, of which empty ones are left out, in the order of the plane."""
    rows, columns = (np.frombuffer(levels, np.uint8).astype(np.int8) for levels in (class_map.rows, class_map.columns))
    runs = np.clip(rows[:, np.newaxis] + columns - CLASS_BIAS, 0, class_map.classes - 1).reshape(-1)
    run = np.dtype((np.void, count // runs.size))  # whole runs are moved several times faster than rows of a matrix
    out = np.empty(runs.size, run)
    out[np.argsort(runs, kind="stable")] = np.concatenate(values).view(run)
    return out.view(np.uint8)


def _open_blocks(plane: Plane, data: memoryview, container: Container) -> Iterator[_Job]:
    """Split the blocks of a Huffman plane into the lengths of lanes and the bit stream, and check that they agree."""
    at = 0
    for block in plane.blocks:
        table = container.tables[block.table]
        stored = data[at : at + block.stored_bytes]
        at += block.stored_bytes
        known = -(-block.phrases // container.lane_phrases) - 1
        lane_bits, used = _read_lanes(stored, known)
        bits = np.frombuffer(stored[used:], np.uint8)
        last = bits.size * 8 - int(lane_bits.sum())
        if last < 1:
            raise malformed("lanes longer than their block")
        yield _Job(block, build_code(table), np.append(lane_bits, last), bits)


def _read_lanes(data: memoryview, lane_count: int) -> tuple[Array, int]:
    """Read the lengths in bits of ``lane_count`` lanes: a least one and what is above it; and the bytes that took."""
    if lane_count == 0:
        return np.zeros(0, np.int64), 0
    if len(data) < 3:
        raise malformed("a block without lane lengths")
    least = int.from_bytes(data[:2], "little")
    width = data[2]
    size = 3 + (lane_count * width + 7) // 8
    if width > 16 or size > len(data):
        raise malformed("lane lengths that do not fit their block")
    flat = np.unpackbits(np.frombuffer(data[3:size], np.uint8), bitorder="little")
    if flat[lane_count * width :].any():
        raise malformed("bits set in the padding of lane lengths")
    lanes = np.full(lane_count, least, np.int64)
    for bit in range(width):
        lanes += flat[bit : lane_count * width : width].astype(np.int64) << bit
    return lanes, size


def _decode_jobs(jobs: Sequence[_Job], lane_phrases: int) -> Iterator[Array]:
    """Decode all ``jobs``; yield the values of each."""
    if not jobs:
        return
    codes = {id(job.code): job.code for job in jobs}
    limit = max(int(code.lengths.max()) for code in codes.values())
    tables = np.concatenate([decoding_table(code.lengths, limit) for code in codes.values()])
    place = {key: index for index, key in enumerate(codes)}
    windows, offsets = bit_windows([job.bits for job in jobs])
    starts = np.concatenate(
        [o + np.cumsum(job.lane_bits) - job.lane_bits for o, job in zip(offsets, jobs, strict=True)]
    )
    ends = starts + np.concatenate([job.lane_bits for job in jobs])
    lanes = [job.lane_bits.size for job in jobs]
    owner = np.repeat([place[id(job.code)] for job in jobs], lanes)
    counts = np.full(starts.size, lane_phrases)
    last = np.cumsum(lanes) - 1
    counts[last] = [job.block.phrases - (size - 1) * lane_phrases for job, size in zip(jobs, lanes, strict=True)]
    order = np.argsort(-counts, kind="stable")
    phrases = np.empty((starts.size, int(counts.max())), np.uint8)
    final = np.empty_like(starts)
    for low in range(0, starts.size, _BLOCK_LANES):
        block = order[low : low + _BLOCK_LANES]
        base = owner[block] << limit if len(codes) > 1 else None
        decoded, final[block] = decode_lanes(windows, (tables, limit, base), starts[block], counts[block])
        phrases[block, : decoded.shape[1]] = decoded
    if (final != ends)[np.delete(np.arange(starts.size), last)].any():
        raise malformed("a lane that does not end where the next one starts")
    first = 0
    for job, where in zip(jobs, last, strict=True):
        _check_padding(job, int(final[where] - starts[where]))
        yield _expand(job, phrases[first : where + 1].reshape(-1)[: job.block.phrases])
        first = where + 1


def _expand(job: _Job, phrases: Array) -> Array:
    """Return the values of a block from its phrases."""
    code, count = job.code, job.block.count
    if code.sizes.max() == 1:
        values: Array = code.values[:, 0][phrases]
        return values
    of_one = -(-int(code.sizes.max()) // _PIECE)
    width = _PIECE if of_one > 1 else 1 << (int(code.sizes.max()) - 1).bit_length()
    letters = np.ascontiguousarray(code.values[:, : of_one * width]).view(f"u{width}").reshape(-1)
    wanted = (np.arange(of_one * width) < code.sizes[:, np.newaxis]).view(f"u{width}").reshape(-1)
    parts = []
    left = count
    for low in range(0, phrases.size, _PART_PHRASES):  # so that the work arrays fit the cache
        pieces = phrases[low : low + _PART_PHRASES].astype(np.intp)
        if of_one > 1:
            pieces = _pieces(pieces, code.sizes, of_one)
        parts.append(letters[pieces].view(np.uint8)[wanted[pieces].view(np.bool_)])
        left -= parts[-1].size
        # A hostile file may have phrases of 64 times the values that it announces: none may come after the last value.
        rest = 1 if low + _PART_PHRASES < phrases.size else 1 - int(code.sizes[phrases[-1]])
        if left < rest:
            raise malformed("phrases of another number of values than announced")
    if left > 0:
        raise malformed("phrases of another number of values than announced")
    return np.concatenate(parts)[:count]


def _pieces(phrases: Array, sizes: Array, of_one: int) -> Array:
    """Return the numbers of the pieces of eight values that ``phrases`` are made of, every one having ``of_one``."""
    counts = (sizes[phrases] + (_PIECE - 1)) // _PIECE
    ends = np.cumsum(counts, dtype=np.int64)
    pieces: Array = np.repeat(phrases * of_one - (ends - counts), counts) + np.arange(int(ends[-1]))
    return pieces


def _check_padding(job: _Job, used: int) -> None:
    """Check that the last lane ends in the last byte and that only zeros follow."""
    spare = int(job.lane_bits[-1]) - used
    if not 0 <= spare < 8 or int(job.bits[-1]) >> (8 - spare):
        raise malformed("a block longer or shorter than its code")
