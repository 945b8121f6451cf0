"""Read a layer's weight in its one orientation, ``(C_out, C_in / groups, *kernel)``, and turn it back for storing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgecompress.errors import ModelError
from edgecompress.graph import Graph, values_of

if TYPE_CHECKING:
    from edgecompress.layers import Layer
    from edgecompress.model import Array


def read_weight(graph: Graph, layer: Layer) -> Array:
    """Return a layer's weight in canonical orientation. Raises ``ModelError`` where it holds NaN or Inf."""
    values = values_of(graph, layer.constant)
    check_finite(layer.name, values)
    return canonical(values, layer)


def check_finite(name: str, values: Array) -> None:
    """Raise ``ModelError`` where ``values`` hold NaN or Inf; memory stays bounded for mapped weights."""
    flat = values.reshape(-1)
    step = 1 << 22
    bad = sum(int(np.count_nonzero(~np.isfinite(flat[start : start + step]))) for start in range(0, flat.size, step))
    if bad:
        raise ModelError(
            f"weight {name!r} holds {bad} NaN or Inf values",
            hint="the model is damaged; export it again from its source",
        )


def canonical(values: Array, layer: Layer) -> Array:
    """Turn stored weight values into ``(C_out, C_in / groups, *kernel)``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":  # stored as (C_in, C_out / groups, *kernel)
        grouped = values.reshape(layer.groups, values.shape[0] // layer.groups, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.shape)
    return values


def stored(values: Array, layer: Layer) -> Array:
    """Undo ``canonical``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":
        out = values.shape[0] // layer.groups
        grouped = values.reshape(layer.groups, out, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.groups * values.shape[1], out, *values.shape[2:])
    return values
