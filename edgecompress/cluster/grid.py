"""Uniform grids: a weight is a small integer times a step, and zeros cost least when the integers are coded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.cluster.feedback import Elimination, assign
from edgecompress.cluster.forms import Grid

Array = NDArray[Any]

LARGEST_CODE = 127

_UNFELT = 0.1  # of the average; the MNIST MLP in 14,000 bytes keeps 96.8 % with it, 93.3 % without; 1 costs ResNet-20


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


def to_grid(weight: Array, step: Array, elimination: Elimination | None = None, *, keep: Array | None = None) -> Grid:
    """Round a canonical weight to multiples of ``step``, with feedback where the elimination of its inputs is given.

    Where it is, small weights of inputs that hardly matter become zero: those that cost less than a tenth of what
    rounding costs on average. Codes of inputs that are always zero would otherwise be paid for, and do nothing.

    Args:
        weight: ``(C_out, ..)``, finite.
        step: see ``Grid``.
        elimination: of the layer's inputs.
        keep: of the weight's shape; codes where it is false are 0.
    """
    if elimination is None:
        codes = _codes(weight, step)
        return Grid(step, codes if keep is None else codes * keep.astype(np.int8))
    felt = _felt(weight, step, elimination)
    steps = step if step.ndim == 0 else step.reshape(elimination.order.shape[0], -1)

    def rule(values: Array) -> Array:
        return _codes(values, steps).astype(step.dtype) * steps

    return Grid(step, _codes(assign(weight, elimination, rule, felt if keep is None else keep & felt), step))


def _felt(weight: Array, step: Array, elimination: Elimination) -> NDArray[np.bool_]:
    """Tell which weights cost more, when they become zero, than a share of what half a step costs on average."""
    energies = np.empty_like(elimination.energies)
    np.put_along_axis(energies, elimination.order, elimination.energies, axis=1)
    groups, width = energies.shape
    rows = (weight / step).astype(np.float64).reshape(groups, -1, width)
    cost = rows**2 * energies[:, None]
    allowed = _UNFELT * 0.25 * energies.mean(axis=1, keepdims=True)[:, None]
    return np.asarray((cost >= allowed).reshape(weight.shape))


def _codes(values: Array, step: Array) -> NDArray[np.int8]:
    return np.clip(np.rint(values / step), -LARGEST_CODE, LARGEST_CODE).astype(np.int8)


def entropy_bits(codes: Array) -> float:
    """Return the bits that an ideal coder of independent symbols needs for ``codes``, whatever integers they are."""
    _, counts = np.unique(codes, return_counts=True)
    return float(np.sum(counts * np.log2(codes.size / counts)))
