"""Clean a graph up before it is compressed: constants become initializers, affine nodes fold into the layer before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.graph import Graph, fresh_name, is_weight_constant, replace_nodes, values_of
from edgecompress.model import Array
from edgecompress.passes.run import Change

_LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm")


def prepare(graph: Graph) -> Sequence[Change]:
    """Turn Constant nodes into initializers, then fold BatchNormalization, Mul and Add by constants into Conv and Gemm."""
    changes = _constants_to_initializers(graph)
    folded = _fold_once(graph)
    while folded:
        changes.extend(folded)
        folded = _fold_once(graph)
    return changes


def _constants_to_initializers(graph: Graph) -> list[Change]:
    outputs = {id(tensor) for tensor in graph.surgeon.outputs}
    removed: dict[int, list[gs.Node]] = {}
    for node in graph.surgeon.nodes:
        values = _constant_values(node) if node.op == "Constant" else None
        if values is None or id(node.outputs[0]) in outputs:
            continue
        result = node.outputs[0]
        node.outputs.clear()
        result.to_constant(values)
        removed[id(node)] = []
    replace_nodes(graph, removed)
    return [Change(layer="", action=f"{len(removed)} Constant nodes became initializers")] if removed else []


def _constant_values(node: gs.Node) -> Any:
    """Return what a Constant node holds as gs stores it, or ``None`` for kinds that stay nodes (strings, sparse)."""
    value = node.attrs.get("value")
    if is_weight_constant(value):
        return value._values
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64), ("value_ints", np.int64)):
        if name in node.attrs and not isinstance(node.attrs[name], gs.Node.AttributeRef):
            return np.asarray(node.attrs[name], dtype=dtype)
    return None


def _fold_once(graph: Graph) -> list[Change]:
    """Fold every affine node whose input is a layer that nothing else reads."""
    outputs = {id(tensor) for tensor in graph.surgeon.outputs}
    changes: list[Change] = []
    removed: dict[int, list[gs.Node]] = {}
    for node in graph.surgeon.nodes:
        if node.op not in _LINEAR_OPS or len(node.outputs[0].outputs) != 1 or id(node.outputs[0]) in outputs:
            continue
        follower = node.outputs[0].outputs[0]
        if id(follower) in removed or not any(follower is known for known in graph.surgeon.nodes):
            continue  # the follower lives in a control-flow body
        affine = _affine(graph, node, follower)
        if affine is None or not _apply(graph, node, *affine):
            continue
        node.outputs = list(follower.outputs)
        follower.inputs.clear()
        removed[id(follower)] = []
        changes.append(Change(layer=node.inputs[1].name, action=f"folded {follower.op}"))
    replace_nodes(graph, removed)
    return changes


def _affine(graph: Graph, node: gs.Node, follower: gs.Node) -> tuple[Array, Array] | None:
    """Return per-channel ``(scale, shift)`` in float64 when ``follower`` computes ``scale * y + shift``."""
    channels = _channels(node)
    if channels is None:
        return None
    if follower.op == "BatchNormalization":
        return _batch_norm(graph, follower)
    if follower.op not in ("Mul", "Add"):
        return None
    other = next((tensor for tensor in follower.inputs if tensor is not node.outputs[0]), None)
    if not is_weight_constant(other) or not np.issubdtype(other.dtype, np.floating):
        return None
    values = _per_channel(values_of(graph, other), channels, _output_rank(node))
    if values is None:
        return None
    return (values, np.zeros(channels)) if follower.op == "Mul" else (np.ones(channels), values)


def _batch_norm(graph: Graph, node: gs.Node) -> tuple[Array, Array] | None:
    constant = all(is_weight_constant(tensor) for tensor in node.inputs[1:5])
    extra = [tensor for tensor in node.outputs[1:] if tensor.name]
    if not constant or extra or node.attrs.get("training_mode", 0):
        return None
    gamma, beta, mean, variance = (values_of(graph, tensor).astype(np.float64) for tensor in node.inputs[1:5])
    scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return scale, beta - mean * scale


def _channels(node: gs.Node) -> int | None:
    """Return how many output channels a layer with a private constant weight has, ``None`` where it cannot be folded into."""
    weight = node.inputs[1]
    if not is_weight_constant(weight) or len(weight.outputs) != 1 or not np.issubdtype(weight.dtype, np.floating):
        return None
    if len(node.inputs) > 2 and node.inputs[2].name and not is_weight_constant(node.inputs[2]):
        return None
    if node.op == "ConvTranspose" and node.attrs.get("group", 1) != 1:
        return None
    if node.op == "Gemm" and node.attrs.get("beta", 1.0) == 0.0:
        return None
    return int(weight.shape[_output_axis(node)])


def _output_axis(node: gs.Node) -> int:
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 1 if node.op == "ConvTranspose" else 0


def _output_rank(node: gs.Node) -> int:
    return len(node.inputs[1].shape)


def _per_channel(values: Array, channels: int, rank: int) -> Array | None:
    """Return a broadcast constant as one float64 value per channel (axis 1 of the output), ``None`` where it is more."""
    if values.size == 1 and values.ndim <= rank:
        return np.full(channels, float(values.reshape(-1)[0]))
    shape = (1,) * (rank - values.ndim) + values.shape
    if values.ndim > rank or shape != (1, channels) + (1,) * (rank - 2):
        return None
    return values.reshape(-1).astype(np.float64)


def _apply(graph: Graph, node: gs.Node, scale: Array, shift: Array) -> bool:
    """Scale a layer's weight and set its bias; False (and nothing changed) where the result would not be finite."""
    weight = node.inputs[1]
    values = values_of(graph, weight)
    axis = _output_axis(node)
    channels = values.shape[axis]
    spread = [1] * values.ndim
    spread[axis] = channels
    beta = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
    bias = values_of(graph, node.inputs[2]).astype(np.float64) if has_bias else np.zeros(channels)
    new_bias = bias * scale + shift / beta
    if not (np.isfinite(scale).all() and np.isfinite(new_bias).all()):
        return False
    weight.values = (values * scale.reshape(spread)).astype(values.dtype)
    private = has_bias and len(node.inputs[2].outputs) == 1
    name = node.inputs[2].name if private else fresh_name(graph, f"{weight.name}.bias")
    constant = gs.Constant(name, new_bias.astype(values.dtype))
    if len(node.inputs) > 2:
        node.inputs[2] = constant
    else:
        node.inputs.append(constant)
    return True
