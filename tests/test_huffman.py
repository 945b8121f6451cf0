from __future__ import annotations

import heapq
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgecompress.coding import canonical_codes, encode
from edgecompress.runtime.codes import code_lengths

COUNTS = st.lists(st.one_of(st.just(0), st.integers(1, 50), st.integers(1, 10**12)), min_size=1, max_size=256)


def kraft(lengths: np.ndarray) -> Fraction:
    return sum((Fraction(1, 2 ** int(length)) for length in lengths if length), Fraction(0))


def huffman_cost(counts: list[int]) -> int:
    """Total bits of Huffman's own construction: the sum of all inner nodes."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        node = heapq.heappop(heap) + heapq.heappop(heap)
        cost += node
        heapq.heappush(heap, node)
    return cost


def best_limited_cost(counts: list[int], limit: int) -> int:
    """The least cost of any lengths that satisfy Kraft's inequality, by dynamic programming over units of 2**-limit."""
    counts = sorted((count for count in counts if count), reverse=True)
    budget = 2**limit
    best = {0: 0}
    for count in counts:
        following: dict[int, int] = {}
        for spent, cost in best.items():
            for length in range(1, limit + 1):
                total = spent + (budget >> length)
                if total <= budget:
                    value = cost + count * length
                    if value < following.get(total, value + 1):
                        following[total] = value
        best = following
    return min(best.values())


@given(COUNTS)
def test_codes_are_complete_and_within_the_limit(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    used = np.array(counts) > 0
    assert lengths.max(initial=0) <= 12
    assert ((lengths > 0) == used).all()
    if used.sum() > 1:
        assert kraft(lengths) == 1


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40))
def test_without_a_limit_that_matters_the_cost_is_huffmans(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts), max_length=40)
    if np.count_nonzero(counts) > 1:
        assert sum(c * int(n) for c, n in zip(counts, lengths, strict=True)) == huffman_cost(counts)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=9), st.integers(4, 6))
@example([2**k for k in range(9)], 4)
def test_with_a_limit_no_code_is_better(counts: list[int], limit: int) -> None:
    if np.count_nonzero(counts) < 2:
        return
    lengths = code_lengths(np.array(counts), max_length=limit)
    assert lengths.max() <= limit
    assert sum(c * int(n) for c, n in zip(counts, lengths, strict=True)) == best_limited_cost(counts, limit)


def test_a_skewed_alphabet_meets_the_limit_of_twelve_bits() -> None:
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    assert code_lengths(np.array(fibonacci), max_length=29).max() == 29
    lengths = code_lengths(np.array(fibonacci))
    assert lengths.max() == 12
    assert kraft(lengths) == 1


def test_lengths_fall_as_counts_rise() -> None:
    counts = np.random.default_rng(0).integers(1, 10**6, 200)
    lengths = code_lengths(counts).astype(int)
    assert (np.diff(lengths[np.argsort(counts, kind="stable")]) <= 0).all()


def test_a_single_symbol_has_one_bit_and_no_symbol_none() -> None:
    assert code_lengths(np.array([0, 7, 0])).tolist() == [0, 1, 0]
    assert code_lengths(np.zeros(3, np.int64)).tolist() == [0, 0, 0]


def test_too_many_symbols_for_the_limit_are_refused() -> None:
    with pytest.raises(ValueError, match="17 symbols"):
        code_lengths(np.ones(17, np.int64), max_length=4)


def test_codes_are_those_of_rfc_1951_mirrored() -> None:
    # The example of RFC 1951, section 3.2.2: lengths of A to H and their codes.
    codes = canonical_codes(np.array([3, 3, 3, 3, 3, 2, 4, 4], np.uint8))
    expected = ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    assert [int(text[::-1], 2) for text in expected] == codes.tolist()


@given(COUNTS)
def test_no_code_is_the_beginning_of_another(counts: list[int]) -> None:
    lengths = code_lengths(np.array(counts))
    codes = canonical_codes(lengths)
    texts = sorted(f"{codes[s]:0{lengths[s]}b}"[::-1] for s in np.flatnonzero(lengths))
    assert not any(b.startswith(a) for a, b in pairwise(texts))


@settings(max_examples=50)
@given(st.binary(max_size=700), st.integers(1, 100))
def test_an_encoded_stream_decodes_symbol_by_symbol(data: bytes, lane_symbols: int) -> None:
    symbols = np.frombuffer(data, np.uint8)
    lengths = code_lengths(np.bincount(symbols, minlength=256))
    lanes, stream = encode(symbols, lengths, lane_symbols)
    codes = canonical_codes(lengths)
    book = {(int(lengths[s]), int(codes[s])): s for s in np.flatnonzero(lengths)}
    bits = np.unpackbits(stream, bitorder="little").tolist()
    at = 0
    decoded = []
    ends = []
    while len(decoded) < symbols.size:
        size = value = 0
        while (size, value) not in book:
            value |= bits[at] << size
            at += 1
            size += 1
        decoded.append(book[size, value])
        if len(decoded) % lane_symbols == 0 or len(decoded) == symbols.size:
            ends.append(at)
    assert bytes(decoded) == data
    assert np.cumsum(lanes).tolist() == ends
    assert len(bits) - at < 8
    assert not any(bits[at:])
