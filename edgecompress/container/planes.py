"""Coding the bytes of a tensor: split into planes, each stored in the way that takes least."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.container.classes import fit_classes
from edgecompress.container.tables import Tables, encode_block
from edgecompress.runtime.layout import Block, ClassMap, Mode, Plane, Table

Array = npt.NDArray[Any]

_SAMPLE_BYTES = 1 << 16
_MIN_GAIN = 0.99  # what does not save 1 % is stored as it is, which is faster to read
_CLASSES = (4, 6, 2)  # how many are tried, the last two only if the first one pays off
_TABLE_BYTES = 8  # of a block and its table, besides the levels, of which several blocks share some
_CLASS_BYTES = 4  # what a map takes besides the levels
_LARGE = 1 << 21  # above, looking for classes takes long


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


@dataclass(frozen=True)
class _Plan:
    """How to code a plane with Huffman: a table and the values for each class that has any; ``size`` is an estimate."""

    size: float
    blocks: tuple[tuple[Table, Array], ...]
    class_map: ClassMap | None = None


def code_stream(raw: bytes, width: int, tables: Tables, shape: tuple[int, int] | None = None) -> Coded:
    """Return the smallest coding found for ``raw``, the values of a tensor in elements of ``width`` bytes.

    ``shape`` is the number of rows and columns that the elements have, if any. New tables are added to ``tables``.
    """
    before = len(tables.entries)
    table = np.frombuffer(raw, np.uint8).reshape(-1, width)
    coded = [_code_plane(np.ascontiguousarray(table[:, index]), tables, shape) for index in range(width)]
    best = Coded(len(table), width, tuple(plane for plane, _ in coded), b"".join(data for _, data in coded))
    if len(best.blob) > _MIN_GAIN * len(raw):
        best = Coded(len(raw), 1, (Plane(Mode.RAW, len(raw)),), bytes(raw))
    if width > 1 and _deflates_below(raw, len(best.blob) / len(raw)):
        data = deflate(raw)
        if len(data) < len(best.blob):
            best = Coded(len(raw), 1, (Plane(Mode.DEFLATE, len(data)),), data)
    if best.planes[0].mode != Mode.HUFFMAN and best.width == 1:
        tables.cut(before)
    return best


def deflate(raw: bytes | memoryview) -> bytes:
    """Return ``raw`` as a raw DEFLATE stream (RFC 1951)."""
    engine = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return engine.compress(raw) + engine.flush()


def _deflates_below(raw: bytes, ratio: float) -> bool:
    """Return whether the start of ``raw`` deflates so well that all of it may come below ``ratio``."""
    sample = raw[:_SAMPLE_BYTES]
    return len(zlib.compress(sample, 6)) < (1.0 if len(sample) == len(raw) else 0.98) * ratio * len(sample) + 16


def _code_plane(values: Array, tables: Tables, shape: tuple[int, int] | None) -> tuple[Plane, bytes]:
    """Return the smallest of the raw bytes, a Huffman code (with classes or not) and DEFLATE."""
    raw = values.tobytes()
    plan = _plan_huffman(values, tables, shape)
    size = min(plan.size, values.size)
    if _deflates_below(raw, size / values.size):
        data = deflate(raw)
        if len(data) < size:
            return Plane(Mode.DEFLATE, len(data)), data
    if plan.size < _MIN_GAIN * values.size:
        return _huffman(plan, tables)
    return Plane(Mode.RAW, values.size), raw


def _plan_huffman(values: Array, tables: Tables, shape: tuple[int, int] | None) -> _Plan:
    """Return the Huffman coding of least size."""
    counts = np.bincount(values, minlength=256)
    table, size = tables.choose(counts)
    best = _Plan(size, ((table, values),))
    if shape is None or values.size > _LARGE or np.count_nonzero(counts) < 2 or size > _MIN_GAIN * values.size:
        return best
    class_map, parts = _best_classes(values.reshape(*shape, -1), _entropy_bytes([values]))
    if class_map is None:
        return best
    chosen = [(*tables.choose(np.bincount(part, minlength=256)), part) for part in parts]
    size = _map_bytes(class_map) + sum(block_bytes for _, block_bytes, _ in chosen)
    return min(best, _Plan(size, tuple((table, part) for table, _, part in chosen), class_map), key=lambda p: p.size)


def _best_classes(runs: Array, least: float) -> tuple[ClassMap | None, list[Array]]:
    """Return the map of classes by which ``runs`` take less than ``least`` bytes and the values of each, or None."""
    best: tuple[ClassMap | None, list[Array]] = None, []
    for classes in _CLASSES:
        class_map, found = fit_classes(runs, classes)
        parts = [runs[found == number].reshape(-1) for number in range(classes)]
        parts = [part for part in parts if part.size]
        size = _map_bytes(class_map) + _entropy_bytes(parts)
        if size < least:
            best, least = (class_map, parts), size
        if best[0] is None:
            break
    return best


def _entropy_bytes(parts: list[Array]) -> float:
    """Return the bytes that ``parts`` take at least, each with a table of its own, and about what these tables take."""
    size = 0.0
    for part in parts:
        counts = np.bincount(part)
        counts = counts[counts > 0]
        size += float(counts @ np.log2(part.size / counts)) / 8 + _TABLE_BYTES + counts.size / 2
    return size


def _map_bytes(class_map: ClassMap) -> float:
    """Return about what a map of classes takes in the meta block, deflated."""
    size = float(_CLASS_BYTES)
    for levels in (class_map.rows, class_map.columns):
        counts = np.bincount(np.frombuffer(levels, np.uint8))
        counts = counts[counts > 0]
        size += 1.2 * float(counts @ np.log2(len(levels) / counts)) / 8 + 2
    return size


def _huffman(plan: _Plan, tables: Tables) -> tuple[Plane, bytes]:
    """Code a plane."""
    blocks = []
    stored = []
    for table, values in plan.blocks:
        data, phrases = encode_block(values, table)
        blocks.append(Block(tables.number(table), values.size, phrases, len(data)))
        stored.append(data)
    blob = b"".join(stored)
    return Plane(Mode.HUFFMAN, len(blob), tuple(blocks), plan.class_map), blob
