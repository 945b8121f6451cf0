"""Uniform grids: a weight is a small integer times a step, and zeros cost least when the integers are coded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.feedback import Elimination, assign
from edgecompress.cluster.forms import Grid

Array = NDArray[Any]

LARGEST_CODE = 127


def grid_step(weight: Array, sigmas: float, *, per_channel: bool = False) -> Array:
    """Return a step of ``sigmas`` times the root mean square of a weight, or of each output channel (the first axis).

    At least so large that no code is beyond 127; 1 where all is zero. In the type of ``weight``, shape ``()`` or
    ``(C_out, 1, ..)``.
    """
    axes = tuple(range(1, weight.ndim)) if per_channel else None
    wide = weight.astype(np.float64)
    spread = np.sqrt(np.mean(wide**2, axis=axes, keepdims=per_channel))
    least = np.max(np.abs(wide), axis=axes, keepdims=per_channel) / LARGEST_CODE
    step = np.maximum(sigmas * spread, least)
    step = np.maximum(np.where(step > 0, step, 1.0), float(np.finfo(weight.dtype).tiny))
    return np.asarray(step, dtype=weight.dtype)


def to_grid(
    weight: Array,
    step: Array,
    elimination: Elimination | None = None,
    *,
    keep: Array | None = None,
    dead_zone: float = 0.5,
) -> Grid:
    """Round a canonical weight to multiples of ``step``, with feedback where the ``elimination`` is given.

    Args:
        weight: ``(C_out, ..)``, finite.
        step: see ``Grid``.
        elimination: of the layer's inputs.
        keep: of the weight's shape; codes where it is false are 0.
        dead_zone: values of less than this many steps become 0; at 0.5, every value the nearest code.
    """
    if elimination is None:
        codes = _codes(weight, step, dead_zone)
        return Grid(step, codes if keep is None else codes * keep.astype(np.int8))
    steps = step if step.ndim == 0 else step.reshape(elimination.order.shape[0], -1)

    def rule(values: Array) -> Array:
        return _codes(values, steps, dead_zone).astype(step.dtype) * steps

    return Grid(step, _codes(assign(weight, elimination, rule, keep), step, 0.5))


def _codes(values: Array, step: Array, dead_zone: float) -> NDArray[np.int8]:
    units = values / step
    codes = np.clip(np.rint(units), -LARGEST_CODE, LARGEST_CODE)
    if dead_zone > 0.5:
        codes = np.where(np.abs(units) < dead_zone, 0, codes)
    return codes.astype(np.int8)


def entropy_bits(codes: Array) -> float:
    """Return the bits that an ideal coder of independent symbols needs for ``codes``, whatever integers they are."""
    _, counts = np.unique(codes, return_counts=True)
    return float(np.sum(counts * np.log2(codes.size / counts)))
