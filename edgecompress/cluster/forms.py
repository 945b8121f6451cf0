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

    def scaled(self, gain: float) -> Clustered:
        """Return the clusters of ``gain`` times the weight; ``gain`` is positive."""
        return Clustered((self.codebook * gain).astype(self.codebook.dtype), self.indices)
