"""Run a model on calibration data and gather the second moment of what flows into each layer, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgecompress.data import DataSet, batches
from edgecompress.errors import DataError
from edgecompress.inference import open_session, run_session
from edgecompress.layers import FACTORIZABLE_OPS, Layer
from edgecompress.model import Array, Model, signature
from edgecompress.moments import Moments, accumulate

ACTIVATION_BUDGET_BYTES = 256 << 20
"""How many bytes of layer inputs one batch may hold; the batch size follows from it."""

MAX_FULL_DIMENSION = 4608
"""Above this width (170 MB in float64) only the diagonal of a moment is kept."""

_POSITIONS_PER_DIMENSION = 16
_MIN_POSITIONS = 16384

Progress = Callable[[int, int], None]


def calibrate(
    model: Model, layers: Sequence[Layer], data: DataSet, *, progress: Progress | None = None
) -> dict[str, Moments]:
    """Return the moments of every Gemm, MatMul and Conv layer by name.

    Memory is bounded by one batch of layer inputs (``ACTIVATION_BUDGET_BYTES``, at least one row) and the moments.
    Convolutions see many positions per image: at most ``max(16384, 16 d)`` of them in all are used, evenly spaced, so
    that the result does not depend on chance.

    Raises:
        ModelError: the runtime cannot run the model on this data.
        DataError: an activation is NaN or Inf.
    """
    sources = {layer.name: _source(layer) for layer in layers if layer.op in FACTORIZABLE_OPS}
    wanted = [layer for layer in layers if layer.name in sources]
    if not wanted:
        return {}
    inputs, _ = signature(model.proto)
    given = {spec.name for spec in inputs}
    session = open_session(model, sorted({name for names in sources.values() for name in names if name not in given}))
    moments: dict[str, Moments] = {}
    size = _batch_size(model, session, data)
    for rows, feeds in batches(data, inputs, size):
        activations = {**feeds, **run_session(model, session, feeds)}
        for layer in wanted:
            moments[layer.name] = _add_batch(moments.get(layer.name), layer, activations, (rows, data.rows))
        if progress:
            progress(min(rows.stop, data.rows), data.rows)
    return moments


def _batch_size(model: Model, session: Any, data: DataSet) -> int:
    """Return how many rows fit the budget, from the bytes of everything that a first batch of one row gives."""
    inputs, _ = signature(model.proto)
    _, feeds = next(iter(batches(data, inputs, 1)))
    per_row = sum(values.nbytes for values in run_session(model, session, feeds).values())
    return max(1, min(256, ACTIVATION_BUDGET_BYTES // max(1, per_row)))


def _source(layer: Layer) -> list[str]:
    """Return the names of the activations that flow into a layer, one per node that uses it."""
    return [_activation(layer, node).name for node in layer.nodes]


def _activation(layer: Layer, node: Any) -> Any:
    return next(tensor for tensor in node.inputs if tensor is not layer.constant)


def _add_batch(
    moments: Moments | None, layer: Layer, activations: Mapping[str, Array], share: tuple[slice, int]
) -> Moments:
    """Add the positions of one batch, from every node that uses the layer."""
    rows, total_rows = share
    dimension = int(np.prod(layer.shape[1:], dtype=np.int64))
    budget = max(_MIN_POSITIONS, _POSITIONS_PER_DIMENSION * dimension)
    quota = max(1, round(budget * (rows.stop - rows.start) / max(1, total_rows)))
    for node in layer.nodes:
        values = activations[_activation(layer, node).name]
        if not np.isfinite(values).all():
            raise DataError(
                f"the input of layer {layer.name!r} is NaN or Inf on the calibration data",
                hint="check the preprocessing, or compress without --data",
            )
        patches = _patches(layer, node, values, quota)
        moments = accumulate(moments, layer.name, patches, full=dimension <= MAX_FULL_DIMENSION)
    assert moments is not None
    return moments


def _patches(layer: Layer, node: Any, values: Array, quota: int) -> Array:
    """Return at most about ``quota`` inputs of a layer, shape ``(positions, groups, d)``, float32 or wider."""
    values = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    if layer.op == "Conv":
        return _conv_patches(layer, node, values, quota)
    if layer.op == "Gemm" and node.attrs.get("transA", 0):
        values = values.T
    if layer.op == "MatMul" and layer.orientation == "as_is":  # the constant is on the left: columns flow in
        values = np.swapaxes(values, -1, -2) if values.ndim > 1 else values
    flat = values.reshape(-1, values.shape[-1])
    return flat[_evenly(len(flat), quota)][:, None, :]


def _conv_patches(layer: Layer, node: Any, values: Array, quota: int) -> Array:
    """Cut evenly spaced patches out of a convolution's input, padded as the node pads."""
    kernel = layer.shape[2:]
    strides = node.attrs.get("strides") or [1] * len(kernel)
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    extents = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = conv_pads(node, values.shape[2:], extents, strides)
    padded = np.pad(values, [(0, 0), (0, 0), *pads])
    windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + len(kernel))))
    windows = windows[(slice(None), slice(None), *(slice(None, None, step) for step in strides))]
    windows = windows[(Ellipsis, *(slice(None, None, step) for step in dilations))]
    batch, channels, *positions = windows.shape[: 2 + len(kernel)]
    chosen = np.unravel_index(_evenly(batch * int(np.prod(positions)), quota), (batch, *positions))
    patches = windows[(chosen[0], slice(None), *chosen[1:])]
    return patches.reshape(len(chosen[0]), layer.groups, channels // layer.groups * int(np.prod(kernel)))


def conv_pads(node: Any, spatial: Sequence[int], extents: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return the (before, after) padding of every spatial axis; ``extents`` are the dilated kernel sizes."""
    mode = node.attrs.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max(0, (-(-size // step) - 1) * step + extent - size)
            for size, extent, step in zip(spatial, extents, strides, strict=True)
        ]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        return list(zip(small, large, strict=True) if mode == "SAME_UPPER" else zip(large, small, strict=True))
    pads = node.attrs.get("pads") if mode == "NOTSET" else None
    pads = pads or [0] * (2 * len(spatial))
    return list(zip(pads[: len(spatial)], pads[len(spatial) :], strict=True))


def _evenly(count: int, quota: int) -> Array:
    """Return about ``quota`` of ``range(count)``, rising, spread by the golden ratio so that no image column is favoured."""
    if count <= quota:
        return np.arange(count)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    return np.unique((np.arange(1, quota + 1) * golden % 1.0 * count).astype(np.int64))
