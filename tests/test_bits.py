from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgecompress.coding import pack_bits


def pack_slowly(values: list[int], widths: list[int]) -> bytes:
    """One bit at a time, from the definition."""
    bits = [value >> bit & 1 for value, width in zip(values, widths, strict=True) for bit in range(width)]
    out = bytearray((len(bits) + 7) // 8)
    for place, bit in enumerate(bits):
        out[place // 8] |= bit << (place % 8)
    return bytes(out)


def pairs(max_width: int, max_size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    one = st.integers(0, max_width).flatmap(lambda w: st.tuples(st.integers(0, 2**w - 1), st.just(w)))
    return st.lists(one, max_size=max_size)


@given(pairs(16, 120))
def test_packing_equals_packing_bit_by_bit(items: list[tuple[int, int]]) -> None:
    values = [value for value, _ in items]
    widths = [width for _, width in items]
    packed = pack_bits(np.array(values, np.uint16), np.array(widths, np.uint8))
    assert packed.dtype == np.uint8
    assert packed.tobytes() == pack_slowly(values, widths)


@given(st.integers(0, 16), st.integers(0, 300), st.integers(0, 2**32))
def test_packing_numbers_of_one_width_equals_packing_bit_by_bit(width: int, count: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**width, count)
    packed = pack_bits(values.astype(np.uint64), np.full(count, width))
    assert packed.tobytes() == pack_slowly(values.tolist(), [width] * count)


def test_nothing_packs_to_nothing() -> None:
    assert pack_bits(np.zeros(0, np.uint8), np.zeros(0, np.uint8)).size == 0


def test_numbers_without_bits_take_no_bytes() -> None:
    assert pack_bits(np.zeros(9, np.uint8), np.zeros(9, np.uint8)).size == 0


def test_the_first_bit_is_the_lowest_of_the_first_byte() -> None:
    assert pack_bits(np.array([1, 0b101], np.uint8), np.array([2, 7], np.uint8)).tolist() == [0b00010101, 0]
