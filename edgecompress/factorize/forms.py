"""The factorized forms of a weight. Each can be multiplied out again: ``to_dense`` is the oracle of tests and reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class LowRank:
    """``W = left @ right`` for a canonical weight ``(O, I, *kernel)``.

    Shapes:
        left: ``(O, rank)``
        right: ``(rank, I, *kernel)``
    """

    left: Array
    right: Array

    @property
    def rank(self) -> int:
        """The inner dimension."""
        return int(self.left.shape[1])

    @property
    def parameters(self) -> int:
        """How many values the factors hold."""
        return int(self.left.size + self.right.size)

    def to_dense(self) -> Array:
        """Return the weight that the factors stand for, shape ``(O, I, *kernel)``, in float64."""
        flat = self.right.reshape(self.rank, -1).astype(np.float64)
        return (self.left.astype(np.float64) @ flat).reshape(self.left.shape[0], *self.right.shape[1:])


def low_rank_parameters(shape: tuple[int, ...], rank: int) -> int:
    """Return the parameters of a rank-``rank`` form of a canonical weight of ``shape``."""
    return rank * (shape[0] + int(np.prod(shape[1:], dtype=np.int64)))


def rank_for_share(shape: tuple[int, ...], share: float) -> int:
    """Return the largest rank whose factors hold at most ``share`` of the parameters, at least 1."""
    per_rank = low_rank_parameters(shape, 1)
    return max(1, int(share * float(np.prod(shape, dtype=np.int64)) / per_rank + 1e-9))
