"""Choosing the codes of an `.ecz` file: levels of values, splits of phrases, and which blocks share a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.coding import encode, pack_bits
from edgecompress.runtime.codes import Code, Kind, build_code, level_weight, most_splits
from edgecompress.runtime.layout import LONG_PHRASE_VALUES, MAX_LEVEL, MAX_PHRASES, MAX_TABLES, PHRASE_VALUES, Table

Array = npt.NDArray[Any]

LANE_PHRASES = 1024  # lengths of lanes cost about 0.2 %, a decoder has 1,000 steps at most for a small model
_PHRASES = (96, MAX_PHRASES)  # how many phrases are tried
_COMMON_BITS = (3, 5, 10)  # how much less likely than the likeliest a common value may be
_CANDIDATES = 4  # tables in the file already that are looked at closely
_WALK = 1 << 16  # positions whose phrases are found together
_BLOCK_BYTES = 6  # of a block in the meta block: table, length, phrases

_LEVEL_LOGS = np.log2([float(level_weight(level)) for level in range(1, MAX_LEVEL + 1)])


@dataclass
class Tables:
    """The tables of a file so far, and the bits that each would take for every value, (256,) float32."""

    entries: list[Table] = field(default_factory=list)
    costs: list[Array] = field(default_factory=list)

    def choose(self, counts: Array) -> tuple[Table, float]:
        """Return the best table for values that occur ``counts`` (256,) times, and about what they take, in bytes."""
        best, size = _new_table(counts)
        size += _table_bytes(best) if len(self.entries) < MAX_TABLES else np.inf
        if self.entries:
            used = np.flatnonzero(counts)
            bits = np.stack(self.costs)[:, used] @ counts[used]
            for index in np.argsort(bits, kind="stable")[:_CANDIDATES].tolist():
                if np.isfinite(bits[index]):
                    known = self.entries[index]
                    best, size = min((best, size), (known, _coded_bytes(known, counts)), key=lambda found: found[1])
        return best, size + _BLOCK_BYTES

    def number(self, table: Table) -> int:
        """Return the number of ``table``, which is added if it is new."""
        if table not in self.entries:
            self.entries.append(table)
            self.costs.append(_value_costs(table))
        return self.entries.index(table)

    def cut(self, size: int) -> None:
        """Forget all tables but the first ``size`` ones."""
        del self.entries[size:], self.costs[size:]


def _value_costs(table: Table) -> Array:
    """Return the bits of every value by the levels of ``table``, infinite where it has none."""
    weights = np.array([level_weight(level) if level else 0 for level in table.levels], np.float32)
    costs = np.full(256, np.inf, np.float32)
    with np.errstate(divide="ignore"):
        costs[(np.arange(weights.size) + table.base) % 256] = np.log2(weights.sum() / weights)
    return costs


def _new_table(counts: Array) -> tuple[Table, float]:
    """Return the best table made for ``counts``, with two values at least, and what they take with it, in bytes."""
    used = np.flatnonzero(counts)
    # The alphabet starts after the longest run of unused values, around the end, as for signed numbers.
    gaps = np.diff(used, append=used[0] + 256)
    base = int(used[(int(np.argmax(gaps)) + 1) % used.size])
    rolled = np.roll(counts, -base)[: 257 - int(gaps.max())].astype(np.float64)
    if used.size == 1:
        rolled = np.array([rolled[0], 0.0])
    rolled[-1] = max(rolled[-1], 2.0**-16)
    logs = np.log2(np.maximum(rolled, 2.0**-20) / rolled.max()) + _LEVEL_LOGS[-1]
    nearest = np.abs(logs[:, np.newaxis] - _LEVEL_LOGS).argmin(axis=1) + 1
    levels = bytes(np.where(rolled > 0, nearest, 0).astype(np.uint8))
    tables = [Table(base, levels, 0, 0), *_splitting(base, levels, PHRASE_VALUES)]
    if any(build_code(table).sizes.max() == PHRASE_VALUES for table in tables):
        tables += _splitting(base, levels, LONG_PHRASE_VALUES)
    return min(((table, _coded_bytes(table, counts)) for table in tables), key=lambda found: found[1])


def _splitting(base: int, levels: bytes, longest: int) -> Iterator[Table]:
    """Yield tables with splits: a few numbers of phrases, extended by all values or by the likelier ones."""
    ranked = sorted(levels, reverse=True)
    used = len(levels) - levels.count(0)
    for common in sorted({ranked[used - 1], *(_at_least(ranked, bits) for bits in _COMMON_BITS)}):
        many = sum(level >= common for level in levels)
        each = many - (many == used)
        splits = {min((phrases - used) // max(each, 1), most_splits(used, many, longest)) for phrases in _PHRASES}
        yield from (Table(base, levels, number, common, longest) for number in sorted(splits) if number > 0)


def _at_least(ranked: list[int], bits: int) -> int:
    """Return the least level of ``ranked`` that is at most ``bits`` halvings below the greatest."""
    return min(level for level in ranked if level >= max(ranked[0] - 8 * bits, 1))


def _coded_bytes(table: Table, counts: Array) -> float:
    """Return about what values that occur ``counts`` times take in phrases of ``table``, in bytes, if in any order."""
    code = build_code(table)
    shares = counts / counts.sum()
    inside = np.arange(code.values.shape[1]) < code.sizes[:, np.newaxis]
    likelihoods = np.where(inside, shares[code.values], 1.0).prod(axis=1)
    rare = code.kinds == Kind.RARE
    if rare.any():
        following = float(likelihoods[rare].sum())
        likelihoods[code.kinds == Kind.CUT] *= following
        likelihoods[rare] *= 1 + likelihoods[code.kinds == Kind.CUT].sum() / max(following, 1e-12)
    values = float(likelihoods @ code.sizes)
    phrases = float(counts.sum()) / values
    return phrases * float(likelihoods @ code.lengths) / 8 + phrases / LANE_PHRASES + 1


def _table_bytes(table: Table) -> float:
    """Return about what a table takes in the meta block, deflated."""
    return 3.0 + 0.8 * len(table.levels)


def encode_block(values: Array, table: Table) -> tuple[bytes, int]:
    """Return the stored bytes of a block of ``values``, (n,) uint8, and how many phrases they are."""
    code = build_code(table)
    phrases = _parse(values, code)
    lanes, bits = encode(phrases, code.lengths, LANE_PHRASES)
    return _lane_lengths(lanes[:-1]) + bits.tobytes(), phrases.size


def _lane_lengths(lanes: Array) -> bytes:
    """Return lengths of lanes as the least one, the bits for what is above it, and that."""
    if not lanes.size:
        return b""
    least = int(lanes.min())
    above = lanes - least
    width = int(above.max()).bit_length()
    head = least.to_bytes(2, "little") + bytes([width])
    return head + pack_bits(above.astype(np.uint64), np.full(lanes.size, width, np.uint64)).tobytes()


def _parse(values: Array, code: Code) -> Array:
    """Return the numbers of the phrases that ``values`` are made of, (phrases,) uint8; the last may reach beyond."""
    longest = int(code.sizes.max())
    follow, first_leaf = _automaton(code)
    padded = np.append(values, np.full(longest, code.values[0, 0], np.uint8)).astype(np.int64)
    found = []
    at = 0
    for begin in range(0, values.size, _WALK):
        end = min(begin + _WALK, values.size)
        state = np.zeros(end - begin, np.int64)
        for ahead in range(longest):
            state = follow[state << 8 | padded[begin + ahead : end + ahead]]
        numbers = state - first_leaf
        sizes = code.sizes[numbers].tobytes()
        starts = []
        at -= begin
        while at < end - begin:
            starts.append(at)
            at += sizes[at]
        at += begin
        found.append(numbers[starts].astype(np.uint8))
    return np.concatenate(found)


def _automaton(code: Code) -> tuple[Array, int]:
    """Return the next state for (state << 8 | value), and the state of the first phrase, where a walk stays."""
    phrases = [bytes(values[:size]) for values, size in zip(code.values, code.sizes.tolist(), strict=True)]
    beginnings = {b"": 0}
    for phrase in phrases:
        for size in range(1, len(phrase)):
            beginnings.setdefault(phrase[:size], len(beginnings))
    leaf = len(beginnings)
    follow = np.repeat(np.arange(leaf + len(phrases)), 256)
    for number, phrase in enumerate(phrases):
        if phrase in beginnings:  # what cannot go on ends here
            follow[beginnings[phrase] << 8 : (beginnings[phrase] + 1) << 8] = leaf + number
    for number, phrase in enumerate(phrases):
        follow[beginnings[phrase[:-1]] << 8 | phrase[-1]] = beginnings.get(phrase, leaf + number)
    for beginning, state in beginnings.items():
        if beginning:
            follow[beginnings[beginning[:-1]] << 8 | beginning[-1]] = state
    return follow, leaf
