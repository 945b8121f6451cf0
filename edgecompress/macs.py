"""Count the multiply-accumulates of a node."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

Shapes = Mapping[str, tuple[int | None, ...]]


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


def _known(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    """Return a shape of which every size is known."""
    shape = shapes.get(name)
    sizes = tuple(size for size in shape or () if size is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None
