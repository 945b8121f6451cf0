"""How far one output is from the original's: signal-to-error ratio and the largest difference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Distortion:
    """Energies summed over all elements, and the largest difference in the output's unit.

    ``max_abs`` and ``sqnr_db`` are None where shapes differed, a value is NaN or infinite, or the output is no numbers.
    """

    signal_energy: float = 0.0
    error_energy: float = 0.0
    max_abs: float | None = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to error in decibels; None where it is infinite (no error) or unknown."""
        if self.max_abs is None or not (self.signal_energy > 0 and self.error_energy > 0):
            return None
        # two logarithms: the quotient of two energies may overflow where each is in range
        return 10 * (math.log10(self.signal_energy) - math.log10(self.error_energy))


UNKNOWN = Distortion(max_abs=None)


def distortion(original: Any, compressed: Any) -> Distortion:
    """Compare two arrays of one output; what cannot be compared is unknown, not an error."""
    if not (isinstance(original, np.ndarray) and isinstance(compressed, np.ndarray)):
        return UNKNOWN
    if original.shape != compressed.shape or original.dtype.kind not in "biufV":
        return UNKNOWN
    signal = original.astype(np.float64)
    error = compressed.astype(np.float64) - signal
    if not (np.isfinite(signal).all() and np.isfinite(error).all()):
        return UNKNOWN
    largest = float(np.abs(error).max(initial=0.0))
    return Distortion(float(np.vdot(signal, signal)), float(np.vdot(error, error)), largest)


def merge(first: Distortion, second: Distortion) -> Distortion:
    """Return the distortion over the elements of both; unknown where either is."""
    if first.max_abs is None or second.max_abs is None:
        return UNKNOWN
    return Distortion(
        first.signal_energy + second.signal_energy,
        first.error_energy + second.error_energy,
        max(first.max_abs, second.max_abs),
    )
