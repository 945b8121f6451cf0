"""Where integers flow when some layers run in int8, so that the runtime fuses them and does not go back to floats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.graph import Graph, is_weight_constant, operator

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer

_FIRST_OPSET_WITH_AXIS = 13

_KEEP_RANGE = ("MaxPool", "Flatten", "Reshape", "Slice", "Pad")
_FLOW = (*_KEEP_RANGE, "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
"""Operators besides the layers' that the runtime has in int8."""

_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")

_FOLDED = ("Relu", "Clip")
"""Rounding to a range that ends at their limits does what they do: the runtime drops them."""


@dataclass(frozen=True)
class Flow:
    """What runs in int8, and which tensors are rounded to 8 bits for it.

    ``nodes`` are in graph order. ``made`` are the tensors that they give as integers, keyed by name, each with the node
    behind which it is rounded; ``taken`` are those that they read as integers while something else gives them.
    ``same`` names, for some of ``made``, the tensor whose range it shares.
    """

    nodes: tuple[gs.Node, ...]
    made: Mapping[str, gs.Node]
    taken: frozenset[str]
    same: Mapping[str, str]

    @property
    def ranged(self) -> list[str]:
        """The tensors whose range has to be known, for these layers in int8 or for fewer."""
        return sorted({*self.made, *self.taken})


def why_float(layer: Layer, opset: int) -> str | None:
    """Say why a layer cannot run in int8, ``None`` where it can."""
    if layer.op not in ("Conv", "Gemm", "MatMul"):
        return f"the runtime has no int8 kernel for {layer.op}"
    if opset < _FIRST_OPSET_WITH_AXIS:
        return f"int8 needs opset {_FIRST_OPSET_WITH_AXIS} (a step for each channel); the model has {opset}"
    if layer.constant.dtype != np.float32:
        return f"only float32 weights run in int8, not {np.dtype(layer.constant.dtype)}"
    return _why_unusual(layer)


def _why_unusual(layer: Layer) -> str | None:
    if layer.is_mixed:
        return "nodes of different kinds share this weight"
    if layer.op == "MatMul" and (len(layer.shape) > 2 or layer.orientation == "as_is"):
        return "only a matrix on the right of a MatMul runs in int8"
    if any(node.attrs.get(name, 1.0) != 1.0 for node in layer.nodes for name in ("alpha", "beta")):
        return "its Gemm is scaled by alpha or beta"
    if any(node.attrs.get("transA", 0) for node in layer.nodes):
        return "its Gemm transposes its input"
    return None


def flow_of(graph: Graph, layers: Sequence[Layer]) -> Flow:
    """Return where integers flow when ``layers`` run in int8; more layers never make fewer tensors integers.

    An operator between layers runs in int8 where all that it reads are integers anyway and an int8 layer needs what it
    gives, or where it pools: fewer values go back to floats then. What only a Concat reads gets the range of its
    result, by which it would be rounded again: so the runtime copies codes and does not look them up. A Relu or Clip
    that alone reads what an int8 node gives is folded: what is rounded is its output.
    """
    chosen = {id(node) for layer in layers for node in layer.nodes}
    # what the layers read, and what int8 nodes give
    rounded = {node.inputs[0].name for layer in layers for node in layer.nodes}
    nodes = []
    for node in graph.surgeon.nodes:
        if id(node) in chosen or _is_fed(node, rounded):
            nodes.append(node)
            rounded.add(_end(graph, node).outputs[0].name)
    needed: set[str] = set()
    kept: list[gs.Node] = []
    for node in reversed(nodes):
        if id(node) in chosen or operator(node) in _POOLS or _end(graph, node).outputs[0].name in needed:
            needed.update(tensor.name for tensor in reads(node))
            kept.insert(0, node)
    made: dict[str, gs.Node] = {}
    same: dict[str, str] = {}
    for node in kept:
        end = _end(graph, node)
        name = end.outputs[0].name
        if operator(node) in ("Gemm", "MatMul") and name not in needed:
            continue  # these give floats without loss
        made[name] = end
        if operator(node) in _KEEP_RANGE:
            same[name] = node.inputs[0].name
        elif operator(node) == "Concat":
            same |= {each.name: name for each in node.inputs if each.name not in same and len(each.outputs) == 1}
    return Flow(tuple(kept), made, frozenset(needed - made.keys()), same)


def reads(node: gs.Node) -> list[gs.Tensor]:
    """Return the activations that a node of the flow reads."""
    return list(node.inputs if operator(node) in ("Add", "Mul", "Concat") else node.inputs[:1])


def _is_fed(node: gs.Node, rounded: Collection[str]) -> bool:
    is_plain = operator(node) in _FLOW and len(node.outputs) == 1  # a MaxPool may give places, too
    return is_plain and not _brings_values(node) and all(tensor.name in rounded for tensor in reads(node))


def _brings_values(node: gs.Node) -> bool:
    """Tell whether a node is a Pad with something else than zeros, which a range may not hold."""
    if operator(node) != "Pad" or len(node.inputs) < 3 or not node.inputs[2].name:
        return False
    value = node.inputs[2]
    return not is_weight_constant(value) or bool(np.any(value.values))


def _end(graph: Graph, node: gs.Node) -> gs.Node:
    """Return the Relu or Clip with fixed limits that is folded into a node, or the node itself."""
    result = node.outputs[0]
    if operator(node) in _KEEP_RANGE or len(result.outputs) != 1:
        return node
    if result.name in graph.output_names | graph.body_names:
        return node
    follower: Any = result.outputs[0]
    limits = follower.inputs[1:]
    is_fixed = all(is_weight_constant(limit) or not limit.name for limit in limits)
    return follower if operator(follower) in _FOLDED and is_fixed else node
