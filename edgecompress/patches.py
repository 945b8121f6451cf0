"""Cut what flows into a layer out of its input tensor: one row per position, in the order of a canonical weight row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer
    from edgecompress.model import Array

PATCH_BUDGET_BYTES = 64 << 20
"""How many bytes of patches are cut out of a layer's input at a time."""

_POSITIONS_PER_DIMENSION = 16
_MIN_POSITIONS = 8192


def activation_name(layer: Layer, node: gs.Node) -> str:
    """Return the name of what flows into a layer at one of its nodes."""
    return str(next(tensor for tensor in node.inputs if tensor is not layer.constant).name)


def positions_wanted(layer: Layer, share: float) -> int:
    """Return how many positions of a share of the rows to use: ``max(8192, 16 d)`` of all rows are plenty."""
    budget = max(_MIN_POSITIONS, _POSITIONS_PER_DIMENSION * math.prod(layer.shape[1:]))
    return max(1, round(budget * share))


def patches(layer: Layer, node: gs.Node, values: Array, quota: int) -> Iterator[Array]:
    """Yield at most about ``quota`` inputs of a layer in blocks ``(positions, groups, d)``, float32 or wider.

    The positions are evenly spread and depend on the shape of ``values`` alone.
    """
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
