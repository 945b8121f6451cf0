"""The codes of Huffman planes: phrases of values and their code lengths, from the levels of single values (SPEC.md).

A phrase is one to eight values, or to 64 where one value makes nearly all. Only the levels of single values are stored:
phrases grow from them where they are likely, after Tunstall, "Synthesis of noiseless compression codes", 1967, and a
Huffman code of limited length is built over the phrases. Everything is exact integer arithmetic, so that every decoder
builds the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.runtime.layout import MAX_CODE_LENGTH, MAX_PHRASES, MAX_TABLES, Table

Array = npt.NDArray[Any]

_SHARE_BITS = 16
_ROOT_BITS = 30
_FACTOR = 16


class Kind(IntEnum):
    """What follows a phrase: any value, only a rare one, or it is a rare value itself."""

    WHOLE = 0
    CUT = 1
    RARE = 2


@dataclass(frozen=True)
class Code:
    """Phrases: ``lengths`` of their codes, ``values`` (n, longest), zeros behind, ``sizes``, ``kinds``; all uint8."""

    lengths: Array
    values: Array
    sizes: Array
    kinds: Array


def level_weight(level: int) -> int:
    """Return the weight that ``level``, 1 to 128, stands for: three bits after the leading one."""
    return (8 + (level - 1) % 8) << (level - 1) // 8


def most_splits(used: int, common: int, longest: int) -> int:
    """Return how often phrases may be split, up to ``longest`` of ``used`` values, of which ``common`` extend them."""
    if common == 0 or used == common == 1:
        return 0
    shorter: int = sum(common**size for size in range(1, longest))
    return min((MAX_PHRASES - used) // (common - (used == common)), shorter)


@lru_cache(maxsize=MAX_TABLES)  # no file makes a reader build a code twice
def build_code(table: Table) -> Code:
    """Return the code of ``table``, which has two used values at least and no more splits than ``most_splits``."""
    values, sizes, kinds, likelihoods = _grow_phrases(table)
    rare = int(likelihoods[kinds == Kind.RARE].sum())
    if rare:
        # Every phrase that was cut is followed by a rare value.
        factor = (rare + int(likelihoods[kinds == Kind.CUT].sum())) * _FACTOR // rare
        likelihoods = np.where(kinds == Kind.RARE, likelihoods * factor // _FACTOR, likelihoods)
    return Code(code_lengths(likelihoods), values, sizes, kinds)


def _grow_phrases(table: Table) -> tuple[Array, Array, Array, Array]:
    """Return values, sizes, kinds and likelihoods of all phrases: the likeliest one is split, ``splits`` times."""
    used = [(table.base + index & 255, level) for index, level in enumerate(table.levels) if level]
    total = sum(level_weight(level) for _, level in used)
    shares = [max((level_weight(level) << _SHARE_BITS) // total, 1) for _, level in used]
    phrases = [bytes([value]) for value, _ in used]
    likelihoods = [share << (_ROOT_BITS - _SHARE_BITS) for share in shares]
    kinds = [Kind.WHOLE if level >= table.common else Kind.RARE for _, level in used]
    more = [(phrase, share) for phrase, share, kind in zip(phrases, shares, kinds, strict=True) if kind == Kind.WHOLE]
    rare_share = sum(shares) - sum(share for _, share in more)
    growable = [(-likelihoods[number], number) for number, kind in enumerate(kinds) if kind == Kind.WHOLE]
    heapify(growable)
    for _ in range(table.splits):
        most, chosen = heappop(growable)
        start = phrases[chosen]
        for index, (value, share) in enumerate(more):
            likelihood = max(-most * share >> _SHARE_BITS, 1)
            if index == 0 and not rare_share:
                place = chosen
                phrases[place], likelihoods[place] = start + value, likelihood
            else:
                place = len(phrases)
                phrases.append(start + value)
                likelihoods.append(likelihood)
                kinds.append(Kind.WHOLE)
            if len(start) + 1 < table.longest:
                heappush(growable, (-likelihood, place))
        if rare_share:
            kinds[chosen] = Kind.CUT
            likelihoods[chosen] = max(-most * rare_share >> _SHARE_BITS, 1)
    values = np.frombuffer(b"".join(phrase.ljust(table.longest, b"\0") for phrase in phrases), np.uint8)
    sizes = np.array([len(phrase) for phrase in phrases], np.uint8)
    return values.reshape(-1, table.longest), sizes, np.array(kinds, np.uint8), np.array(likelihoods, np.int64)


def code_lengths(counts: Array, max_length: int = MAX_CODE_LENGTH) -> Array:
    """Return the lengths of an optimal prefix code, as (alphabet,) uint8.

    ``counts`` is (alphabet,) non-negative integers. Symbols that never occur get length 0; a single one gets length 1.
    No length exceeds ``max_length``. Raises ``ValueError`` if that is too short for the number of symbols.
    Source: the package-merge algorithm of Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman
    codes", J. ACM 37(3), 1990. Of equal weights coins come before packages, earlier symbols before later ones.
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
