"""Huffman decoding with numpy in *lockstep*: one step takes one symbol from every lane, with a few array operations.

So the cost of a step is shared by thousands of lanes, or by all small tensors of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_VALID_BITS = 64 - 15  # bits of a 64-bit window that are left after aligning it, windows being 16 bits apart
_PACK = 8  # symbols of a lane that are gathered before they are moved to their place


def bit_windows(streams: Sequence[Array]) -> tuple[Array, list[int]]:
    """Return (64-bit windows that start every 16 bits of all bit streams together; the first bit of each stream)."""
    sizes = [bits.size for bits in streams]
    count = (sum(sizes) + 1) // 2 + 1
    padded = np.zeros(2 * count + 16, np.uint8)
    padded[: sum(sizes)] = np.concatenate(streams)
    windows = np.empty(count, np.int64)
    for first in range(4):  # every fourth window starts where the one before ends
        part = windows[first::4]
        part[:] = padded[2 * first : 2 * first + 8 * part.size].view("<i8")
    return windows, [8 * offset for offset in np.cumsum([0, *sizes[:-1]]).tolist()]


@cache
def _mirrored(bits: int) -> Array:
    """Return every number of ``bits`` bits with its bits in reverse order."""
    numbers = np.arange(1 << bits)
    out = np.zeros_like(numbers)
    for bit in range(bits):
        out |= (numbers >> bit & 1) << (bits - 1 - bit)
    return out


def decoding_table(lengths: Array, limit: int) -> Array:
    """Return the decoding table: for the next ``limit`` bits, the symbol in the low byte and its code length above."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    sizes = lengths[order].astype(np.int64)
    ascending = np.repeat(sizes << 8 | order, 1 << (limit - sizes))
    return ascending[_mirrored(limit)]


def decode_lanes(
    windows: Array, code: tuple[Array, int, Array | None], starts: Array, counts: Array
) -> tuple[Array, Array]:
    """Decode lanes side by side; ``counts`` descend. Return the symbols, (lanes, steps) uint8, and where lanes end."""
    tables, limit, base = code
    lanes = starts.size
    steps = int(counts[0])
    rows = np.empty((-(-steps // _PACK), lanes, _PACK), np.uint8)
    position = starts.astype(np.int64)
    work = np.empty((3, lanes), np.int64)
    changes = sorted({*counts.tolist(), 0})
    for begin, end in pairwise(changes):
        active = int(np.searchsorted(-counts, -begin, side="left"))
        views = (position[:active], *work[:, :active])
        offsets = None if base is None else base[:active]
        _run(windows, (tables, limit, offsets), views, (rows[:, :active], begin, end))
    packed = rows.reshape(rows.shape[0], -1).view(np.uint64)
    symbols = np.ascontiguousarray(packed.T).view(np.uint8).reshape(lanes, -1)
    return symbols[:, :steps], position


def _run(
    windows: Array,
    code: tuple[Array, int, Array | None],
    views: tuple[Array, ...],
    target: tuple[Array, int, int],
) -> None:
    """Take symbols ``begin`` to ``end`` from every lane.

    ``mode="clip"`` spares numpy a copy of the output; it also keeps any position within the windows.
    """
    tables, limit, base = code
    position, bits, index, entry = views
    rows, begin, end = target
    mask = (1 << limit) - 1
    refill = _VALID_BITS // limit
    for step in range(begin, end):
        if (step - begin) % refill == 0:
            np.right_shift(position, 4, out=index)
            np.take(windows, index, out=bits, mode="clip")
            np.bitwise_and(position, 15, out=index)
            np.right_shift(bits, index, out=bits)
        np.bitwise_and(bits, mask, out=index)
        if base is not None:
            np.add(index, base, out=index)
        np.take(tables, index, out=entry, mode="clip")
        rows[step // _PACK, :, step % _PACK] = entry
        np.right_shift(entry, 8, out=entry)
        np.right_shift(bits, entry, out=bits)
        np.add(position, entry, out=position)
