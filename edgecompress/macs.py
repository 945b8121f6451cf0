"""Count the multiply-accumulates of a node, and say where its weight is applied so that other forms can be counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Shapes = Mapping[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Extent:
    """Where a node applies its weight: ``rows`` of the batch, and the sizes of the other axes before and after it.

    For Conv ``inputs`` and ``outputs`` are the spatial sizes, one per kernel axis. For Gemm and MatMul both are the
    sizes of all axes but the one that is multiplied, and ``rows`` is 1.
    """

    rows: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def count_macs(node: gs.Node, position: int, shape: tuple[int, ...], shapes: Shapes) -> int | None:
    """Return the multiply-accumulates of one run of a node with a stored weight of ``shape`` at input ``position``.

    ``shapes`` gives the shapes of activations by name; ``None`` where one that is needed is unknown.
    """
    count = math.prod(shape)
    if node.op == "Gather":
        return 0
    data, result = _known(shapes, node.inputs[0].name), _known(shapes, node.outputs[0].name)
    if node.op in ("LSTM", "GRU"):  # every weight is used once per step and row of the batch
        return None if data is None else count * math.prod(data[:2])
    if node.op == "ConvTranspose":
        return None if data is None else count * data[0] * math.prod(data[2:])
    if result is None:
        return None
    if node.op == "Conv":
        return count * result[0] * math.prod(result[2:])
    inner = shape[-1] if (node.op == "MatMul" and position == 0) or node.attrs.get("transB", 0) else shape[-2]
    return math.prod(result) * inner


def find_extent(node: gs.Node, position: int, shapes: Shapes) -> Extent | None:
    """Return where a Conv, Gemm or MatMul applies the weight at input ``position``; ``None`` where that is unknown."""
    result = _known(shapes, node.outputs[0].name)
    if result is None or not result:
        return None
    if node.op == "Conv":
        data = _known(shapes, node.inputs[0].name)
        return None if data is None else Extent(result[0], data[2:], result[2:])
    if node.op not in ("Gemm", "MatMul"):
        return None
    on_left = node.op == "MatMul" and position == 0
    positions = (*result[:-2], *result[-1:]) if on_left else result[:-1]  # on the left, columns are multiplied
    return Extent(1, positions, positions)


def _known(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    """Return a shape of which every size is known."""
    shape = shapes.get(name)
    sizes = tuple(size for size in shape or () if size is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None
