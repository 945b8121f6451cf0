"""Decoding the payload of an `.ecz` file with numpy.

Huffman planes are decoded in *lockstep*: one step takes one symbol from every lane, of all planes of a batch, with a
handful of array operations. So the cost of a step is shared by thousands of lanes, or by all small tensors of a model.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgecompress.runtime.format import inflate, malformed
from edgecompress.runtime.layout import Container, FileEntry, Mode, Plane, Stream
from edgecompress.runtime.lockstep import bit_windows, decode_lanes, decoding_table

Array = npt.NDArray[Any]

_BATCH_BYTES = 1 << 23  # decoded bytes of the streams that are decoded together
_STREAM_COST = 1 << 14  # what a stream counts at least: the decoding tables of a batch take memory, too
_BLOCK_LANES = 8192  # lanes in one loop: its work arrays fit the second-level cache


@dataclass(frozen=True)
class _Job:
    """A Huffman plane to decode: ``count`` coded symbols, lengths of its lanes in bits, and the bit stream."""

    plane: Plane
    count: int
    lengths: Array
    lanes: Array
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
    streams = [container.streams[number] for number in numbers]
    blobs = []
    for stream in streams:
        handle.seek(stream.offset)
        blob = handle.read(stream.stored_bytes)
        if len(blob) != stream.stored_bytes or zlib.crc32(blob) != stream.crc:
            raise malformed("checksum mismatch in a payload stream")
        blobs.append(blob)
    decoded = decode_streams(streams, blobs, container.lane_symbols)
    return {number: data.data for number, data in zip(numbers, decoded, strict=True)}


def decode_streams(streams: Sequence[Stream], blobs: Sequence[bytes], lane_symbols: int) -> list[Array]:
    """Return the raw bytes of each stream as (bytes,) uint8; all Huffman planes are decoded together.

    ``blobs`` are the stored bytes of the streams. Raises ``FormatError`` where they do not decode.
    """
    outputs = [np.empty((stream.count, stream.width), np.uint8) for stream in streams]
    jobs: list[_Job] = []
    targets: list[Array] = []
    for stream, blob, output in zip(streams, blobs, outputs, strict=True):
        at = 0
        for index, plane in enumerate(stream.planes):
            data = memoryview(blob)[at : at + plane.stored_bytes]
            at += plane.stored_bytes
            if plane.mode == Mode.HUFFMAN:
                jobs.append(_open_plane(plane, data, stream.count, lane_symbols))
                targets.append(output[:, index])
            else:
                raw = data if plane.mode == Mode.RAW else inflate(data, stream.count)
                output[:, index] = np.frombuffer(raw, np.uint8)
    _decode_jobs(jobs, targets, lane_symbols)
    return [output.reshape(-1) for output in outputs]


def _open_plane(plane: Plane, data: memoryview, count: int, lane_symbols: int) -> _Job:
    """Split a Huffman plane into the lengths of its lanes and its bit stream, and check that they agree."""
    assert plane.lengths is not None
    count = -(-count * plane.symbol_bits // 8)
    lane_count = -(-count // lane_symbols)
    known, used = _read_lanes(data, lane_count - 1)
    bits = np.frombuffer(data[used:], np.uint8)
    last = bits.size * 8 - int(known.sum())
    if last < 1:
        raise malformed("lanes longer than their plane")
    # The length of the last lane is not stored: its end is checked after decoding, to the byte.
    return _Job(plane, count, plane.lengths, np.append(known, last), bits)


def _read_lanes(data: memoryview, lane_count: int) -> tuple[Array, int]:
    """Read the lengths in bits of ``lane_count`` lanes: a least value and what is above it; and the bytes that took."""
    if lane_count == 0:
        return np.zeros(0, np.int64), 0
    if len(data) < 4:
        raise malformed("a plane without lane lengths")
    least = int.from_bytes(data[:3], "little")
    width = data[3]
    size = 4 + (lane_count * width + 7) // 8
    if width > 16 or size > len(data):
        raise malformed("lane lengths that do not fit their plane")
    flat = np.unpackbits(np.frombuffer(data[4:size], np.uint8), bitorder="little")
    if flat[lane_count * width :].any():
        raise malformed("bits set in the padding of lane lengths")
    lanes = np.full(lane_count, least, np.int64)
    for bit in range(width):
        lanes += flat[bit : lane_count * width : width].astype(np.int64) << bit
    return lanes, size


def _decode_jobs(jobs: Sequence[_Job], targets: Sequence[Array], lane_symbols: int) -> None:
    """Decode all ``jobs`` into ``targets``."""
    if not jobs:
        return
    limit = max(int(job.lengths.max()) for job in jobs)
    tables = np.concatenate([decoding_table(job.lengths, limit) for job in jobs])
    windows, offsets = bit_windows([job.bits for job in jobs])
    starts = np.concatenate([o + np.cumsum(job.lanes) - job.lanes for o, job in zip(offsets, jobs, strict=True)])
    ends = starts + np.concatenate([job.lanes for job in jobs])
    owner = np.repeat(np.arange(len(jobs)), [job.lanes.size for job in jobs])
    counts = np.full(starts.size, lane_symbols)
    last = np.cumsum([job.lanes.size for job in jobs]) - 1
    counts[last] = [job.count - (job.lanes.size - 1) * lane_symbols for job in jobs]
    order = np.argsort(-counts, kind="stable")
    symbols = np.empty((starts.size, int(counts.max())), np.uint8)
    final = np.empty_like(starts)
    for low in range(0, starts.size, _BLOCK_LANES):
        block = order[low : low + _BLOCK_LANES]
        base = owner[block] << limit if len(jobs) > 1 else None
        decoded, final[block] = decode_lanes(windows, (tables, limit, base), starts[block], counts[block])
        symbols[block, : decoded.shape[1]] = decoded
    used_bits = final[last] - starts[last]
    if (final != ends)[np.delete(np.arange(starts.size), last)].any():
        raise malformed("a lane that does not end where the next one starts")
    first = 0
    for job, target, used, where in zip(jobs, targets, used_bits, last, strict=True):
        _check_padding(job, int(used))
        target[:] = _unfold(job.plane, symbols[first : where + 1].reshape(-1)[: job.count], target.size)
        first = where + 1


def _unfold(plane: Plane, symbols: Array, count: int) -> Array:
    """Return the ``count`` bytes of a plane from its coded symbols."""
    if plane.symbol_bits == 8:
        return symbols + np.uint8(plane.base) if plane.base else symbols
    shifts = np.arange(0, 8, plane.symbol_bits, dtype=np.uint8)
    each = np.arange(256, dtype=np.uint8)[:, np.newaxis] >> shifts & np.uint8((1 << plane.symbol_bits) - 1)
    each += np.uint8(plane.base)
    table = each.view(f"u{shifts.size}").reshape(-1)  # all bytes of a coded symbol as one number
    unfolded = table[symbols].view(np.uint8)
    if (unfolded[count:] != plane.base).any():
        raise malformed("symbols after the last one")
    return unfolded[:count]


def _check_padding(job: _Job, used: int) -> None:
    """Check that the last lane ends in the last byte and that only zeros follow."""
    spare = int(job.lanes[-1]) - used
    if not 0 <= spare < 8 or int(job.bits[-1]) >> (8 - spare):
        raise malformed("a plane longer or shorter than its code")
