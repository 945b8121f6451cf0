"""Writing numbers of a few bits each, back to back, least significant bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

MAX_WIDTH = 16
_GROUP = 4  # numbers merged before they are placed: 4 x 16 bits fill one 64-bit word


def pack_bits(values: Array, widths: Array) -> Array:
    """Return ``values`` written one after the other, ``widths[i]`` bits each, as uint8.

    ``values`` and ``widths`` are (n,) unsigned integers; a width is 0 to 16 and ``values[i] < 2 ** widths[i]``.
    Bit 0 of a value comes first and goes to the lowest free bit of the current byte. The last byte is filled with
    zeros.
    """
    if widths.size == 0:
        return np.zeros(0, np.uint8)
    padding = -widths.size % _GROUP
    codes = np.zeros(widths.size + padding, np.uint64)
    codes[: widths.size] = values
    lengths = np.zeros(codes.size, np.uint64)
    lengths[: widths.size] = widths
    for _ in range(2):  # pairs, then pairs of pairs
        codes = codes[::2] | (codes[1::2] << lengths[::2])
        lengths = lengths[::2] + lengths[1::2]
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    words = _place(codes, ends - lengths, total)
    return words.astype("<u8", copy=False).view(np.uint8)[: (total + 7) // 8].copy()


def _place(codes: Array, starts: Array, total: int) -> Array:
    """Return 64-bit words in which each code lies at its bit position; codes have at most 64 bits and leave no gap."""
    words = np.zeros(total // 64 + 2, np.uint64)
    index = starts >> np.uint64(6)
    shift = starts & np.uint64(63)
    # Codes leave no gap and have at most 64 bits, so every word up to the last used one has a code that starts in it.
    first = np.flatnonzero(np.diff(index, prepend=np.uint64(2**63)))
    where = index[first].astype(np.int64)
    words[where] = np.bitwise_or.reduceat(codes << shift, first)
    # Only the last code that starts in a word can reach into the next one.
    last = np.append(first[1:], index.size) - 1
    back = np.uint64(64) - shift[last]
    spill = np.where(back < 64, codes[last] >> (back & np.uint64(63)), np.uint64(0))
    words[where + 1] |= spill
    return words
