"""The forms of a weight that has few values."""

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


@dataclass(frozen=True)
class Grid:
    """Every weight is a small integer times a step: ``W = step * codes``, in the type of ``step``.

    Shapes:
        step: ``()``, or ``(C_out, 1, ..)`` with one step per output channel, in the weight's own type, positive
        codes: the weight's shape, int8, -127 .. 127
    """

    step: Array
    codes: NDArray[np.int8]

    def to_dense(self) -> Array:
        """Return the weight, computed as the operators Cast and Mul compute it."""
        return np.asarray(self.codes.astype(self.step.dtype) * self.step)

    def scaled(self, gain: float) -> Grid:
        """Return the grid of ``gain`` times the weight; ``gain`` is positive."""
        return Grid(np.asarray(self.step * gain, dtype=self.step.dtype), self.codes)
