"""Run a model on calibration data and gather the second moment of what flows into each layer, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.data import DataSet, batches
from edgecompress.errors import DataError
from edgecompress.inference import open_session, run_session
from edgecompress.model import Array, Model, signature
from edgecompress.moments import Moments, accumulate

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer

ACTIVATION_BUDGET_BYTES = 256 << 20
"""How many bytes of layer inputs one batch may hold; the batch size follows from it."""

PATCH_BUDGET_BYTES = 64 << 20
"""How many bytes of patches are cut out of a layer's input at a time."""

MAX_FULL_DIMENSION = 4608
"""Above this width (170 MB in float64) only the diagonal of a moment is kept."""

_POSITIONS_PER_DIMENSION = 16
_MIN_POSITIONS = 8192

Progress = Callable[[int, int], None]


def calibrate(
    model: Model, layers: Sequence[Layer], data: DataSet, *, progress: Progress | None = None
) -> dict[str, Moments]:
    """Return the moments of every Gemm, MatMul and Conv layer by name (those whose ``takes_moments`` is true).

    Memory is bounded by one batch of layer inputs (``ACTIVATION_BUDGET_BYTES``, at least one row), a block of patches
    and the moments.
    Convolutions see many positions per image: at most ``max(8192, 16 d)`` of them in all are used, evenly spaced, so
    that the result does not depend on chance.

    Raises:
        ModelError: the runtime cannot run the model on this data.
        DataError: an activation is NaN or Inf.
    """
    wanted = [layer for layer in layers if layer.takes_moments]
    if not wanted:
        return {}
    inputs, _ = signature(model.proto)
    sources = {_activation(layer, node) for layer in wanted for node in layer.nodes}
    session = open_session(model, sorted(sources - {spec.name for spec in inputs}))
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


def _activation(layer: Layer, node: gs.Node) -> str:
    """Return the name of what flows into a layer at one of its nodes."""
    return str(next(tensor for tensor in node.inputs if tensor is not layer.constant).name)


def _add_batch(
    moments: Moments | None, layer: Layer, activations: Mapping[str, Array], share: tuple[slice, int]
) -> Moments:
    """Add the positions of one batch, from every node that uses the layer."""
    rows, total_rows = share
    dimension = math.prod(layer.shape[1:])
    budget = max(_MIN_POSITIONS, _POSITIONS_PER_DIMENSION * dimension)
    quota = max(1, round(budget * (rows.stop - rows.start) / max(1, total_rows)))
    for node in layer.nodes:
        values = activations[_activation(layer, node)]
        if not np.isfinite(values).all():
            raise DataError(
                f"the input of layer {layer.name!r} is NaN or Inf on the calibration data",
                hint="check the preprocessing, or compress without --data",
            )
        for patches in _patches(layer, node, values, quota):
            moments = accumulate(moments, layer.name, patches, full=dimension <= MAX_FULL_DIMENSION)
    if moments is None:
        raise DataError(f"nothing flows into layer {layer.name!r} on the calibration data", hint="give more data")
    return moments


def _patches(layer: Layer, node: gs.Node, values: Array, quota: int) -> Iterator[Array]:
    """Yield at most about ``quota`` inputs of a layer in blocks ``(positions, groups, d)``, float32 or wider."""
    wide = np.promote_types(values.dtype, np.float32)
    windows = _conv_windows(layer, node, values) if layer.op == "Conv" else _vectors(layer, node, values)
    axes = 1 if layer.op != "Conv" else len(layer.shape) - 1
    chosen = _evenly(math.prod(windows.shape[:axes]), quota)
    dimension = math.prod(layer.shape[1:])
    step = max(1, PATCH_BUDGET_BYTES // (layer.groups * dimension * wide.itemsize))
    for start in range(0, len(chosen), step):
        block = windows[np.unravel_index(chosen[start : start + step], windows.shape[:axes])]
        yield block.astype(wide, copy=False).reshape(len(block), layer.groups, dimension)


def _vectors(layer: Layer, node: gs.Node, values: Array) -> Array:
    """Return the inputs of a Gemm or MatMul, shape ``(positions, d)``."""
    if layer.op == "Gemm" and node.attrs.get("transA", 0):
        values = values.T
    if layer.op == "MatMul" and layer.orientation == "as_is" and values.ndim > 1:
        values = np.swapaxes(values, -1, -2)  # the constant is on the left: columns flow in
    return values.reshape(-1, values.shape[-1])


def _conv_windows(layer: Layer, node: gs.Node, values: Array) -> Array:
    """Return a view of a convolution's input, padded as the node pads: ``(batch, *positions, channels, *kernel)``."""
    kernel = layer.shape[2:]
    strides = node.attrs.get("strides") or [1] * len(kernel)
    dilations = node.attrs.get("dilations") or [1] * len(kernel)
    extents = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    padded = np.pad(values, [(0, 0), (0, 0), *conv_pads(node, values.shape[2:], extents, strides)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + len(kernel))))
    every = [slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations))]
    windows = windows[tuple(every)]
    return np.moveaxis(windows, 1, 1 + len(kernel))


def conv_pads(
    node: gs.Node, spatial: Sequence[int], extents: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
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
    """Return about ``quota`` of ``range(count)``, rising, spread by the golden ratio: no image column is favoured."""
    if count <= quota:
        return np.arange(count)
    golden = (np.sqrt(5.0) - 1.0) / 2.0
    return np.unique((np.arange(1, quota + 1) * golden % 1.0 * count).astype(np.int64))
