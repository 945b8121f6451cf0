from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompress.container.classes import fit_classes
from edgecompress.container.tables import Tables, encode_block
from edgecompress.runtime.codes import Kind, build_code, level_weight, most_splits
from edgecompress.runtime.layout import LONG_PHRASE_VALUES, PHRASE_VALUES, Table


@st.composite
def tables(draw: st.DrawFn) -> Table:
    levels = draw(st.lists(st.one_of(st.just(0), st.integers(1, 128)), min_size=2, max_size=256))
    levels[:2] = [max(level, 1) for level in levels[:2]]
    common = draw(st.sampled_from(sorted({level for level in levels if level})))
    many = sum(level >= common for level in levels)
    used = len(levels) - levels.count(0)
    longest = draw(st.sampled_from([PHRASE_VALUES, LONG_PHRASE_VALUES]))
    splits = draw(st.integers(0, most_splits(used, many, longest)))
    base = draw(st.integers(0, 255))
    return Table(base, bytes(levels), splits, common, longest) if splits else Table(base, bytes(levels), 0, 0)


def phrases_of(table: Table) -> list[bytes]:
    code = build_code(table)
    return [bytes(values[:size]) for values, size in zip(code.values, code.sizes.tolist(), strict=True)]


def test_weights_grow_by_an_eighth_of_their_power_of_two() -> None:
    assert [level_weight(level) for level in (1, 2, 8, 9, 10, 16, 17, 128)] == [8, 9, 15, 16, 18, 30, 32, 15 << 15]


@settings(deadline=None)
@given(tables())
def test_the_code_of_any_table_is_complete_and_its_phrases_differ(table: Table) -> None:
    code = build_code(table)
    assert sum(Fraction(1, 2 ** int(length)) for length in code.lengths) == 1
    assert code.lengths.max() <= 12
    found = phrases_of(table)
    assert len(set(found)) == len(found) <= 256
    assert max(map(len, found)) <= table.longest


@settings(deadline=None)
@given(tables())
def test_every_value_can_follow_every_beginning_so_anything_can_be_coded(table: Table) -> None:
    found = set(phrases_of(table))
    alphabet = {(index + table.base) % 256 for index, level in enumerate(table.levels) if level}
    inner = {phrase[:size] for phrase in found for size in range(1, len(phrase))}
    # A beginning that is no phrase itself is followed by all values.
    for beginning in {b"", *inner} - found:
        assert {phrase[len(beginning)] for phrase in found | inner if phrase[:-1] == beginning} == alphabet


@settings(deadline=None, max_examples=60)
@given(tables(), st.integers(1, 1000), st.integers(0, 2**32))
def test_phrases_of_a_block_put_together_are_its_values(table: Table, count: int, seed: int) -> None:
    alphabet = [(index + table.base) % 256 for index, level in enumerate(table.levels) if level]
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(np.full(len(alphabet), 0.3))
    values = generator.choice(alphabet, count, p=shares).astype(np.uint8)
    data, number = encode_block(values, table)
    code = build_code(table)
    book = slow_codes(code.lengths)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").tolist()  # one lane, so nothing before them
    out = bytearray()
    place = 0
    for _ in range(number):
        key: tuple[int, ...] = ()
        while key not in book:
            key = (*key, bits[place])
            place += 1
        out += phrases_of(table)[book[key]]
    assert bytes(out[:count]) == values.tobytes()
    assert len(out) - count < table.longest
    assert not any(bits[place:])


def slow_codes(lengths: np.ndarray) -> dict[tuple[int, ...], int]:
    """Canonical codes as in RFC 1951, section 3.2.2, first bit first."""
    book = {}
    code = 0
    previous = 0
    for symbol in sorted(range(lengths.size), key=lambda symbol: (int(lengths[symbol]), symbol)):
        length = int(lengths[symbol])
        code <<= length - previous
        book[tuple(int(bit) for bit in f"{code:0{length}b}")] = symbol
        code += 1
        previous = length
    return book


@pytest.mark.parametrize("longest", [PHRASE_VALUES, LONG_PHRASE_VALUES])
@pytest.mark.parametrize(("used", "common"), [(2, 1), (2, 2), (3, 1), (3, 2), (16, 16), (200, 3), (256, 256)])
def test_the_most_splits_are_possible_and_one_more_is_not(used: int, common: int, longest: int) -> None:
    levels = bytes([100] * common + [50] * (used - common))
    most = most_splits(used, common, longest)
    assert len(phrases_of(Table(0, levels, most, 60, longest))) <= 256
    phrases = used + (most + 1) * (common - (used == common))
    assert phrases > 256 or most == sum(common**size for size in range(1, longest))


def test_after_a_cut_phrase_only_rare_values_come_and_their_codes_are_short_enough_for_that() -> None:
    # 0 nearly always, 1 seldom: seven splits make eight phrases of zeros, each but the longest is followed by 1.
    code = build_code(Table(0, bytes([128, 80]), 7, 100))
    assert code.kinds.tolist() == [Kind.CUT, Kind.RARE, *[Kind.CUT] * 6, Kind.WHOLE]
    assert code.sizes.tolist() == [1, 1, 2, 3, 4, 5, 6, 7, 8]
    # The likelihood of a 1 by itself is 1.5 %, that of a phrase that begins with it 11 %.
    assert code.lengths[1] <= 4
    assert code.lengths[8] == 1


def test_one_table_serves_blocks_of_nearly_the_same_distribution() -> None:
    generator = np.random.default_rng(0)
    known = Tables()
    for _ in range(10):
        values = np.rint(generator.normal(0, 1, 5000)).astype(np.int8).view(np.uint8)
        table, _ = known.choose(np.bincount(values, minlength=256))
        known.number(table)
    assert len(known.entries) <= 3  # the first one may lack a rare value that a later block has


def test_classes_separate_rows_and_columns_of_different_scale() -> None:
    generator = np.random.default_rng(0)
    wide_rows, wide_columns = generator.permutation(40) < 20, generator.permutation(30) < 10
    scale = np.where(wide_rows, 4.0, 1.0)[:, np.newaxis] * np.where(wide_columns, 4.0, 1.0)
    values = np.rint(generator.normal(size=(40, 30, 9)) * scale[:, :, np.newaxis]).astype(np.int8).view(np.uint8)
    class_map, classes = fit_classes(values, 4)
    assert sum(class_map.class_sizes()) == 40 * 30
    assert [int((classes == number).sum()) for number in range(4)] == class_map.class_sizes()
    # Runs of one scale are in one class, and the scales are apart.
    assert all(len(set(classes[scale == size].tolist())) == 1 for size in (1.0, 4.0, 16.0))
    assert len({int(classes[scale == size][0]) for size in (1.0, 4.0, 16.0)}) == 3


@pytest.mark.parametrize(("share", "others", "most"), [(0.95, 15, 1.02), (0.98, 1, 1.02), (0.99, 3, 1.03)])
def test_many_zeros_take_little_more_than_their_entropy(share: float, others: int, most: float) -> None:
    # Table and block included. With phrases of eight values at most, these are 1.04, 1.37 and 1.79.
    generator = np.random.default_rng(0)
    count = 100_000
    values = np.where(generator.random(count) < share, 0, generator.integers(1, others + 1, count)).astype(np.uint8)
    counts = np.bincount(values, minlength=256)
    table, _ = Tables().choose(counts)
    data, _ = encode_block(values, table)
    used = counts[counts > 0]
    entropy = float(used @ np.log2(count / used)) / 8
    assert len(data) + len(table.levels) + 8 < most * entropy
