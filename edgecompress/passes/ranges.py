"""The range that each activation takes on calibration data, and the 8 bits that stand for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgecompress.calibrate import batch_rows
from edgecompress.data import batches
from edgecompress.errors import DataError
from edgecompress.inference import open_session, run_session
from edgecompress.model import signature

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.model import Array, Model

LEVELS = 255
"""Steps between the smallest and the largest of the values that 8 bits hold."""

_SAMPLES = 1 << 17
"""Values that are kept of one tensor, evenly spaced."""

_LEAST_STEP = 1e-30  # products of two steps are still float32 numbers

_SHRINKS = np.linspace(0.3, 1.0, 36)


@dataclass(frozen=True)
class Range:
    """What the 8-bit values of a tensor span: ``low <= 0 <= high``, so that zero (a padded border) is exact."""

    low: float
    high: float

    @property
    def scale(self) -> np.float32:
        """The difference between neighbouring values; 1 where the tensor is as good as all zeros."""
        step = (self.high - self.low) / LEVELS
        return np.float32(step if step > _LEAST_STEP else 1.0)

    @property
    def zero_point(self) -> np.uint8:
        """The code that stands for 0."""
        return np.uint8(np.clip(np.rint(-self.low / self.scale), 0, LEVELS))


def activation_ranges(
    model: Model,
    names: Iterable[str],
    data: DataSet,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Range]:
    """Return the range of each tensor in ``names`` that rounds the values seen with the least squared error.

    Memory is bounded by one batch of the tensors and 0.5 MB for each of them.

    Raises:
        ModelError: the runtime cannot run the model on this data.
        DataError: an activation is NaN or Inf.
    """
    wanted = sorted(set(names))
    inputs, _ = signature(model.proto)
    session = open_session(model, [name for name in wanted if name not in {spec.name for spec in inputs}])
    samples: dict[str, list[Array]] = {name: [np.zeros(1, np.float32)] for name in wanted}
    for rows, feeds in batches(data, inputs, batch_rows(model, wanted, data)):
        found = {**feeds, **run_session(model, session, feeds)}
        share = (rows.stop - rows.start) / data.rows
        for name in wanted:
            samples[name].append(_sample(name, found[name], int(np.ceil(_SAMPLES * share))))
        if progress:
            progress(min(rows.stop, data.rows), data.rows)
    return {name: best_range(np.concatenate(parts)) for name, parts in samples.items()}


def _sample(name: str, values: Array, count: int) -> Array:
    """Return evenly spaced values, and the extremes."""
    flat = values.reshape(-1)
    low, high = flat.min(), flat.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise DataError(
            f"activation {name!r} is NaN or Inf on the calibration data",
            hint="check the preprocessing, or compress without --quantize",
        )
    return np.concatenate([flat[:: -(-flat.size // count)], [low, high]])


def best_range(values: Array) -> Range:
    """Return the range, 0.3 to 1 times what ``values`` span, that rounds them with the least squared error.

    A range narrower than the extremes cuts a few values off and has finer steps for all others.
    """
    whole = Range(min(0.0, float(values.min())), max(0.0, float(values.max())))
    tried = [Range(whole.low * shrink, whole.high * shrink) for shrink in _SHRINKS]
    return min(tried, key=lambda each: _rounding_error(values, each))


def _rounding_error(values: Array, span: Range) -> float:
    codes = np.clip(np.rint(values / span.scale) + span.zero_point, 0, LEVELS)
    return float(np.sum(((codes - np.float32(span.zero_point)) * span.scale - values) ** 2, dtype=np.float64))
