"""Find convolutions that lose more by going to integers and back than integers save them.

The constants are what onnxruntime 1.31 takes on one thread of a processor with AVX512-VNNI: about 100 multiply-
accumulates a nanosecond in float32 and 300 in int8; a value that goes to integers or back passes a rounding, a change
of the order of channels and a copy, 0.3 ns together. Nothing is timed: the same model gives the same choice everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgecompress.layers import default_shapes
from edgecompress.model import infer_shapes
from edgecompress.passes.flow import Flow, flow_of, reads

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.graph import Graph
    from edgecompress.layers import Layer

_MACS_PER_VALUE = 45
"""What int8 saves on so many multiply-accumulates, 1/100 - 1/300 ns each, is what one value costs on its way."""

_MACS_PER_TENSOR = 600_000
"""The same for the nodes that each such tensor needs, 4 us together."""


def losing_islands(graph: Graph, layers: Sequence[Layer]) -> frozenset[str]:
    """Return those of ``layers`` that are better not in int8, where all of them would be.

    An island are nodes that pass integers to each other; it loses when its multiply-accumulates are too few for the
    tensors that it takes from floats and gives to floats. Matrices alone never lose: the runtime gives their results as
    floats at no cost. A shape or count that is unknown keeps the island.
    """
    flow = flow_of(graph, layers)
    shapes = infer_shapes(graph.model.proto, default_shapes(graph))
    lost: set[str] = set()
    for island in _islands(flow):
        members = set(map(id, island))
        own = [layer for layer in layers if any(id(node) in members for node in layer.nodes)]
        crossed = {name: math.prod(size or 0 for size in shapes.get(name, (0,))) for name in _crossed(flow, island)}
        cost = sum(_MACS_PER_TENSOR + _MACS_PER_VALUE * count for count in crossed.values())
        is_known = all(crossed.values()) and all(layer.macs is not None for layer in own)
        if is_known and any(layer.op == "Conv" for layer in own) and sum(layer.macs or 0 for layer in own) < cost:
            lost.update(layer.name for layer in own)
    return frozenset(lost)


def _islands(flow: Flow) -> list[list[gs.Node]]:
    """Return the nodes of the flow, those together that integers flow between."""
    island_of: dict[str, list[gs.Node]] = {}  # by the tensor that a node of it makes
    ends = {id(node): name for name, node in flow.made.items()}
    islands: list[list[gs.Node]] = []
    for node in flow.nodes:
        joined = {id(each): each for tensor in reads(node) if (each := island_of.get(tensor.name)) is not None}
        merged = [member for island in joined.values() for member in island] + [node]
        islands = [island for island in islands if id(island) not in joined] + [merged]
        for name, island in island_of.items():
            if id(island) in joined:
                island_of[name] = merged
        island_of |= {ends[id(end)]: merged for end in _ends(node) if id(end) in ends}
    return islands


def _ends(node: gs.Node) -> list[gs.Node]:
    """Return the node and what may be folded into it."""
    result: Any = node.outputs[0]
    return [node, *result.outputs]


def _crossed(flow: Flow, island: Sequence[gs.Node]) -> set[str]:
    """Return the tensors that the island takes from floats, and those that it gives to them."""
    inside = set(map(id, flow.nodes))
    taken = {tensor.name for node in island for tensor in reads(node) if tensor.name in flow.taken}
    given = set()
    for end in (end for node in island for end in _ends(node)):
        result: Any = end.outputs[0]
        stays = result.outputs and all(id(reader) in inside for reader in result.outputs)
        if flow.made.get(result.name) is end and not stays:
            given.add(result.name)
    return taken | given
