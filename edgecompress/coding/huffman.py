"""Canonical Huffman codes of limited length, and an encoder that cuts the stream into lanes.

A *lane* is the code of a fixed number of consecutive symbols. Lanes lie back to back in one bit stream; their lengths
in bits are kept beside it, so that a decoder can work on all lanes at once, in step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.coding.bits import pack_bits

Array = npt.NDArray[Any]

MAX_LENGTH = 12  # a decoding table of 4,096 entries stays in the first-level cache


def code_lengths(counts: Array, max_length: int = MAX_LENGTH) -> Array:
    """Return the lengths of an optimal prefix code, as (alphabet,) uint8.

    ``counts`` is (alphabet,) non-negative integers. Symbols that never occur get length 0; a single one gets length 1.
    No length exceeds ``max_length``. Raises ``ValueError`` if that is too short for the number of symbols.
    Source: the package-merge algorithm of Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman
    codes", J. ACM 37(3), 1990.
    """
    lengths = np.zeros(counts.size, np.uint8)
    used = np.flatnonzero(counts)
    if used.size > 2**max_length:
        raise ValueError(f"{used.size} symbols have no prefix code of at most {max_length} bits")
    if used.size < 2:
        lengths[used] = 1
        return lengths
    order = used[np.argsort(counts[used], kind="stable")]
    for count in _coins_per_level(counts[order].astype(np.int64), max_length):
        lengths[order[:count]] += 1
    return lengths


def _coins_per_level(weights: Array, max_length: int) -> list[int]:
    """Return how many of the lightest symbols get one more bit at each level; ``weights`` ascend."""
    is_coin: list[Array] = []
    merged = weights
    for _ in range(max_length):
        even = merged.size // 2 * 2 if is_coin else 0
        candidates = np.concatenate([weights, merged[:even:2] + merged[1:even:2]])
        order = np.argsort(candidates, kind="stable")
        merged = candidates[order]
        is_coin.append(order < weights.size)
    taken = 2 * weights.size - 2
    coins = []
    for level in reversed(is_coin):
        coins.append(int(np.count_nonzero(level[:taken])))
        taken = 2 * (taken - coins[-1])  # each package stands for two items one level below
    return coins


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

    ``symbols`` is (n,) uint8, ``lengths`` is what ``code_lengths`` returned for them; a lane has ``lane_symbols``
    symbols, the last one what is left.
    """
    widths = lengths[symbols]
    stream = pack_bits(canonical_codes(lengths)[symbols], widths)
    starts = np.arange(0, symbols.size, lane_symbols)
    lanes = np.add.reduceat(widths, starts, dtype=np.int64) if starts.size else np.zeros(0, np.int64)
    return lanes, stream
