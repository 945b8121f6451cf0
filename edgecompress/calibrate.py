"""Run a model on calibration data and gather the second moment of what flows into each layer, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.data import DataSet, batches
from edgecompress.errors import DataError
from edgecompress.inference import open_session, run_session
from edgecompress.model import Array, Model, signature
from edgecompress.moments import Moments, accumulate
from edgecompress.patches import activation_name, patches, positions_wanted

if TYPE_CHECKING:
    from edgecompress.layers import Layer

ACTIVATION_BUDGET_BYTES = 256 << 20
"""How many bytes of layer inputs one batch may hold; the batch size follows from it."""

MAX_FULL_DIMENSION = 4608
"""Above this width (170 MB in float64) only the diagonal of a moment is kept."""

MOMENT_BUDGET_BYTES = 4 << 30
"""How many bytes the moments of all layers may take. Where they would take more, the widest keep only the diagonal:
solved in graph order, each layer still has its full moment, gathered when its turn comes."""

Progress = Callable[[int, int], None]


def calibrate(
    model: Model, layers: Sequence[Layer], data: DataSet, *, progress: Progress | None = None
) -> dict[str, Moments]:
    """Return the moments by name of every layer whose ``takes_moments`` is true.

    Memory is bounded by one batch of layer inputs (``ACTIVATION_BUDGET_BYTES``, at least one row), a block of patches
    and the moments (``MOMENT_BUDGET_BYTES``).
    Convolutions see many positions per image: at most ``max(24576, 16 d)`` of them in all are used, evenly spaced, so
    that the result does not depend on chance.

    Raises:
        ModelError: the runtime cannot run the model on this data.
        DataError: an activation is NaN or Inf.
    """
    wanted = [layer for layer in layers if layer.takes_moments]
    if not wanted:
        return {}
    inputs, _ = signature(model.proto)
    sources = {activation_name(layer, node) for layer in wanted for node in layer.nodes}
    session = open_session(model, sorted(sources - {spec.name for spec in inputs}))
    full = _full_moments(wanted)
    moments: dict[str, Moments] = {}
    size = _rows_per_batch(model, session, data)
    for rows, feeds in batches(data, inputs, size):
        activations = {**feeds, **run_session(model, session, feeds)}
        for layer in wanted:
            known = moments.get(layer.name)
            share = (rows.stop - rows.start) / data.rows
            moments[layer.name] = _add_batch(known, layer, activations, share, full=layer.name in full)
        if progress:
            progress(min(rows.stop, data.rows), data.rows)
    return moments


def batch_rows(model: Model, names: Sequence[str], data: DataSet) -> int:
    """Return how many rows to run at a time where the inner tensors in ``names`` are looked at."""
    inputs, _ = signature(model.proto)
    return _rows_per_batch(model, open_session(model, sorted(set(names) - {spec.name for spec in inputs})), data)


def check_activation(layer: Layer, values: Array) -> None:
    """Raise ``DataError`` where NaN or Inf flows into a layer."""
    if not np.isfinite(values).all():
        raise DataError(
            f"the input of layer {layer.name!r} is NaN or Inf on the calibration data",
            hint="check the preprocessing, or compress without --data",
        )


def _rows_per_batch(model: Model, session: Any, data: DataSet) -> int:
    """Return how many rows fit the budget, from the bytes of everything that a first batch of one row gives."""
    inputs, _ = signature(model.proto)
    _, feeds = next(iter(batches(data, inputs, 1)))
    per_row = sum(values.nbytes for values in run_session(model, session, feeds).values())
    return max(1, min(256, ACTIVATION_BUDGET_BYTES // max(1, per_row)))


def _full_moments(layers: Sequence[Layer]) -> set[str]:
    """Return the layers whose moment is kept whole, the narrow ones first."""
    names, left = set(), MOMENT_BUDGET_BYTES
    for layer in sorted(layers, key=lambda layer: math.prod(layer.shape[1:])):
        dimension = math.prod(layer.shape[1:])
        left -= 8 * layer.groups * dimension**2
        if dimension <= MAX_FULL_DIMENSION and left >= 0:
            names.add(layer.name)
    return names


def _add_batch(
    moments: Moments | None, layer: Layer, activations: Mapping[str, Array], share: float, *, full: bool
) -> Moments:
    """Add the positions of one batch, a ``share`` of all rows, from every node that uses the layer."""
    quota = positions_wanted(layer, share)
    for node in layer.nodes:
        values = activations[activation_name(layer, node)]
        check_activation(layer, values)
        for block in patches(layer, node, values, quota):
            moments = accumulate(moments, layer.name, block, full=full)
    if moments is None:
        raise DataError(f"nothing flows into layer {layer.name!r} on the calibration data", hint="give more data")
    return moments
