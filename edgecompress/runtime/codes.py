"""The codes of Huffman planes: phrases of values and their code lengths, from the levels of single values (SPEC.md).

A phrase is one to eight values. Only the levels of single values are stored: phrases grow from them where they are
likely, after Tunstall, "Synthesis of noiseless compression codes", 1967, and a Huffman code of limited length is built
over the phrases. Everything is exact integer arithmetic, so that every decoder builds the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.runtime.layout import MAX_CODE_LENGTH, MAX_PHRASE_VALUES, MAX_PHRASES, MAX_TABLES, Table

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
    """Phrases: ``lengths`` of their codes, ``values`` (n, 8) with zeros behind, ``sizes``, ``kinds``; all uint8."""

    lengths: Array
    values: Array
    sizes: Array
    kinds: Array


def level_weight(level: int) -> int:
    """Return the weight that ``level``, 1 to 128, stands for: three bits after the leading one."""
    return (8 + (level - 1) % 8) << (level - 1) // 8


def most_splits(used: int, common: int) -> int:
    """Return how often phrases of ``used`` different values, of which ``common`` extend them, may be split."""
    if common == 0 or used == common == 1:
        return 0
    shorter: int = sum(common**size for size in range(1, MAX_PHRASE_VALUES))
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
    levels = np.frombuffer(table.levels, np.uint8)
    used = np.flatnonzero(levels)
    weights = np.array([level_weight(int(level)) for level in levels[used]], np.int64)
    shares = np.maximum((weights << _SHARE_BITS) // int(weights.sum()), 1)
    symbols = (used + table.base).astype(np.uint8)
    is_common = levels[used] >= table.common
    more, more_shares = symbols[is_common], shares[is_common]
    rare_share = int(shares[~is_common].sum())
    kept = 0 if rare_share else 1  # children that come in place of the phrase
    end = used.size
    count = end + table.splits * (more.size - kept)
    values = np.zeros((count, MAX_PHRASE_VALUES), np.uint8)
    sizes = np.ones(count, np.uint8)
    kinds = np.full(count, Kind.WHOLE, np.uint8)
    likelihoods = np.zeros(count, np.int64)
    values[:end, 0] = symbols
    likelihoods[:end] = shares << (_ROOT_BITS - _SHARE_BITS)
    kinds[:end][~is_common] = Kind.RARE
    growable = np.where(kinds == Kind.RARE, 0, likelihoods)
    for _ in range(table.splits):
        chosen = int(growable[:end].argmax())
        size = int(sizes[chosen])
        children = np.maximum(likelihoods[chosen] * more_shares >> _SHARE_BITS, 1)
        behind = np.arange(end, end + more.size - kept)
        places = np.append(chosen, behind) if kept else behind
        values[places] = values[chosen]
        values[places, size] = more
        sizes[places] = size + 1
        if not kept:
            kinds[chosen] = Kind.CUT
            likelihoods[chosen] = max(int(likelihoods[chosen]) * rare_share >> _SHARE_BITS, 1)
            growable[chosen] = 0
        likelihoods[places] = children
        growable[places] = children if size + 1 < MAX_PHRASE_VALUES else 0
        end += behind.size
    return values, sizes, kinds, likelihoods


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
