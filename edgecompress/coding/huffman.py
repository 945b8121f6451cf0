"""Canonical prefix codes, and an encoder that cuts the stream into lanes.

A *lane* is the code of a fixed number of consecutive symbols. Lanes lie back to back in one bit stream; their lengths
in bits are kept beside it, so that a decoder can work on all lanes at once, in step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.coding.bits import pack_bits

Array = npt.NDArray[Any]


def canonical_codes(lengths: Array) -> Array:
    """Return the canonical codes for ``lengths``, (alphabet,) uint16, each with its first bit lowest.

    Codes ascend with (length, symbol), as in RFC 1951, section 3.2.2, and are then mirrored, because the stream is read
    from the least significant bit. Symbols of length 0 have code 0.
    """
    codes = np.zeros(lengths.size, np.uint16)
    code = 0
    previous = 0
    for symbol in sorted(np.flatnonzero(lengths).tolist(), key=lambda s: (int(lengths[s]), s)):
        length = int(lengths[symbol])
        code <<= length - previous
        codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
        code += 1
        previous = length
    return codes


def encode(symbols: Array, lengths: Array, lane_symbols: int) -> tuple[Array, Array]:
    """Return (the length of every lane in bits, int64; the bit stream, uint8) of ``symbols``.

    ``symbols`` is (n,) uint8, ``lengths`` are those of a complete prefix code for them; a lane has ``lane_symbols``
    symbols, the last one what is left.
    """
    widths = lengths[symbols]
    stream = pack_bits(canonical_codes(lengths)[symbols], widths)
    starts = np.arange(0, symbols.size, lane_symbols)
    lanes = np.add.reduceat(widths, starts, dtype=np.int64) if starts.size else np.zeros(0, np.int64)
    return lanes, stream
