"""The clustered forms of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Clustered:
    """Every weight is one of a few values: ``W = codebook[indices]``.

    Shapes:
        codebook: ``(clusters,)``, rising, in the weight's own type
        indices: the weight's shape, uint8
    """

    codebook: Array
    indices: NDArray[np.uint8]

    def to_dense(self) -> Array:
        """Return the weight that the indices stand for."""
        return np.asarray(self.codebook[self.indices])


def index_entropy_bits(indices: NDArray[np.uint8]) -> float:
    """Return the zeroth-order entropy of the indices, bits per weight."""
    counts = np.bincount(indices.reshape(-1))
    shares = counts[counts > 0] / indices.size
    return float(-(shares * np.log2(shares)).sum())
