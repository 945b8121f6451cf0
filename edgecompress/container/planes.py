"""Coding the bytes of a tensor: split into planes, each stored in the way that takes least."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.coding import code_lengths, encode, pack_bits
from edgecompress.runtime.layout import SYMBOL_BITS, Mode, Plane

Array = npt.NDArray[Any]

LANE_SYMBOLS = 1024  # lengths of lanes cost about 0.2 %, a decoder has 1,000 steps at most for a small model
_TABLE_OVERHEAD = 24  # bytes that a plane costs in the meta block besides its code lengths, about
_SAMPLE_BYTES = 1 << 16
_MIN_GAIN = 0.99  # what does not save 1 % is stored as it is, which is faster to read


@dataclass(frozen=True)
class Coded:
    """The planes of a stream and their bytes, one after the other."""

    count: int
    width: int
    planes: tuple[Plane, ...]
    blob: bytes

    @property
    def is_raw(self) -> bool:
        """Return whether nothing could be saved."""
        return self.width == 1 and self.planes[0].mode == Mode.RAW


def code_stream(raw: bytes, width: int) -> Coded:
    """Return the smallest coding found for ``raw``, the values of a tensor in elements of ``width`` bytes."""
    table = np.frombuffer(raw, np.uint8).reshape(-1, width)
    coded = [_code_plane(np.ascontiguousarray(table[:, index])) for index in range(width)]
    best = Coded(len(table), width, tuple(plane for plane, _ in coded), b"".join(data for _, data in coded))
    if len(best.blob) > _MIN_GAIN * len(raw):
        best = Coded(len(raw), 1, (Plane(Mode.RAW, len(raw)),), bytes(raw))
    if width > 1 and _deflates_below(raw, len(best.blob) / len(raw)):
        data = deflate(raw)
        if len(data) < len(best.blob):
            best = Coded(len(raw), 1, (Plane(Mode.DEFLATE, len(data)),), data)
    return best


def deflate(raw: bytes | memoryview) -> bytes:
    """Return ``raw`` as a raw DEFLATE stream (RFC 1951)."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return engine.compress(raw) + engine.flush()


def _deflates_below(raw: bytes, ratio: float) -> bool:
    """Return whether the start of ``raw`` deflates so well that all of it may come below ``ratio``."""
    sample = raw[:_SAMPLE_BYTES]
    return len(zlib.compress(sample, 6)) < (1.0 if len(sample) == len(raw) else 0.98) * ratio * len(sample) + 16


def _code_plane(symbols: Array) -> tuple[Plane, bytes]:
    """Return the smallest of the raw bytes, a Huffman code (folded or not) and DEFLATE."""
    raw = symbols.tobytes()
    best = Plane(Mode.RAW, symbols.size), raw
    huffman, size = _plan_huffman(symbols)
    if huffman is not None and size < _MIN_GAIN * symbols.size:
        plane, data = _huffman(symbols, huffman)
        best = replace(plane, stored_bytes=len(data)), data
    else:
        size = symbols.size
    if _deflates_below(raw, size / symbols.size):
        data = deflate(raw)
        if len(data) < min(size, symbols.size):
            best = Plane(Mode.DEFLATE, len(data)), data
    return best


def fold(symbols: Array, base: int, symbol_bits: int) -> Array:
    """Return ``8 / symbol_bits`` consecutive symbols, less ``base``, in each byte, the first one lowest."""
    small = symbols - np.uint8(base)
    if symbol_bits == 8:
        return small
    per_byte = 8 // symbol_bits
    padded = np.zeros(-(-small.size // per_byte) * per_byte, np.uint8)
    padded[: small.size] = small
    shifts = np.arange(0, 8, symbol_bits, dtype=np.uint8)
    folded: Array = np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1)
    return folded


def _plan_huffman(symbols: Array) -> tuple[Plane | None, float]:
    """Return the Huffman plane of least size, without its size filled in, and about what it takes in all, in bytes."""
    base = _base(np.bincount(symbols, minlength=256))
    best: Plane | None = None
    least = float("inf")
    span = int((symbols - np.uint8(base)).max(initial=0)) + 1
    for bits in SYMBOL_BITS:
        if span > 1 << bits or span == 1:
            continue
        folded = fold(symbols, base, bits)
        counts = np.bincount(folded)
        if np.count_nonzero(counts) < 2:
            continue
        lengths = code_lengths(counts)
        size = float(counts @ lengths.astype(np.int64)) / 8 + folded.size / LANE_SYMBOLS + _table_bytes(lengths)
        if size < least:
            best, least = Plane(Mode.HUFFMAN, 0, lengths, bits, base), size
    return best, least


def _table_bytes(lengths: Array) -> float:
    """Return about what a table of code lengths takes in the meta block."""
    return len(zlib.compress(lengths.tobytes(), 9)) + _TABLE_OVERHEAD


def _base(counts: Array) -> int:
    """Return the symbol after the longest run of unused ones (around the end, as for signed numbers)."""
    used = np.flatnonzero(counts)
    gaps = np.diff(used, append=used[0] + 256)
    return int(used[(int(np.argmax(gaps)) + 1) % used.size])


def _huffman(symbols: Array, plane: Plane) -> tuple[Plane, bytes]:
    """Code a plane: the lengths of all lanes but the last, then the bits."""
    assert plane.lengths is not None
    lanes, bits = encode(fold(symbols, plane.base, plane.symbol_bits), plane.lengths, LANE_SYMBOLS)
    return plane, _lane_table(lanes[:-1]) + bits.tobytes()


def _lane_table(lanes: Array) -> bytes:
    """Return the lengths of lanes as the least one, the bits for what is above it, and that."""
    if not lanes.size:
        return b""
    least = int(lanes.min())
    above = lanes - least
    width = int(above.max()).bit_length()
    head = least.to_bytes(3, "little") + bytes([width])
    return head + pack_bits(above.astype(np.uint64), np.full(lanes.size, width, np.uint64)).tobytes()
