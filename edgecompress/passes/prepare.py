"""Clean a graph up before it is compressed: constants become initializers, affine nodes fold into layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from edgecompress.graph import Graph, fresh_name, is_weight_constant, operator, replace_nodes, values_of
from edgecompress.passes.run import Change

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgecompress.model import Array

_LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm")
_FLOAT_TYPES = (np.float16, np.float32, np.float64)


def prepare(graph: Graph) -> Sequence[Change]:
    """Turn Constant nodes into initializers; fold BatchNormalization, Mul and Add by constants into Conv and Gemm."""
    changes = _constants_to_initializers(graph)
    folded = _fold_once(graph)
    while folded:
        changes.extend(folded)
        folded = _fold_once(graph)
    return changes


def _constants_to_initializers(graph: Graph) -> list[Change]:
    removed: dict[int, list[gs.Node]] = {}
    for node in graph.surgeon.nodes:
        if operator(node) != "Constant" or len(node.outputs) != 1 or node.outputs[0].name in graph.output_names:
            continue
        result = node.outputs[0]
        values = _constant_values(graph.origins[id(node)], result.name)
        if values is None:
            continue
        node.outputs.clear()
        result.to_constant(values)
        graph.added[result.name] = result
        removed[id(node)] = []
    replace_nodes(graph, removed)
    return [Change(layer="", action=f"{len(removed)} Constant nodes became initializers")] if removed else []


def _constant_values(node: onnx.NodeProto, name: str) -> LazyValues | None:
    """Return what a Constant node holds, ``None`` where it holds nothing that is known."""
    for attribute in node.attribute:
        if attribute.name == "value":
            return LazyValues(attribute.t)
        if attribute.name == "sparse_value":
            sparse = onnx.SparseTensorProto()
            sparse.CopyFrom(attribute.sparse_tensor)
            sparse.values.name = name
            return SparseValues(sparse)
        if attribute.name in _SCALAR_KINDS:
            value = onnx.helper.get_attribute_value(attribute)
            dims = [len(value)] if attribute.name.endswith("s") else []
            flat = list(value) if dims else [value]
            return LazyValues(onnx.helper.make_tensor(name, _SCALAR_KINDS[attribute.name], dims, flat))
    return None


_SCALAR_KINDS = {
    "value_float": onnx.TensorProto.FLOAT,
    "value_floats": onnx.TensorProto.FLOAT,
    "value_int": onnx.TensorProto.INT64,
    "value_ints": onnx.TensorProto.INT64,
    "value_string": onnx.TensorProto.STRING,
    "value_strings": onnx.TensorProto.STRING,
}


def _fold_once(graph: Graph) -> list[Change]:
    """Fold every affine node whose input is a layer that nothing else reads."""
    present = {id(node) for node in graph.surgeon.nodes}
    changes: list[Change] = []
    removed: dict[int, list[gs.Node]] = {}
    for node in graph.surgeon.nodes:
        result = node.outputs[0] if operator(node) in _LINEAR_OPS and len(node.inputs) > 1 else None
        if result is None or len(result.outputs) != 1 or result.name in graph.output_names | graph.body_names:
            continue
        follower = result.outputs[0]
        if id(follower) not in present or not _is_foldable(graph, node):
            continue
        affine = _affine(graph, node, follower)
        if affine is None or not _apply(graph, node, *affine):
            continue
        final = follower.outputs[0]
        follower.outputs.clear()
        follower.inputs.clear()
        node.outputs = [final]
        present.discard(id(follower))
        removed[id(follower)] = []
        changes.append(Change(layer=node.inputs[1].name, action=f"folded {follower.op}"))
    replace_nodes(graph, removed)
    return changes


def _is_foldable(graph: Graph, node: gs.Node) -> bool:
    """Tell whether a layer's weight is its own to scale, and its bias known."""
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    if (
        not is_weight_constant(weight)
        or len(weight.outputs) != 1
        or weight.name in graph.output_names | graph.body_names
    ):
        return False
    if weight.dtype not in _FLOAT_TYPES or len(weight.shape) < 2:
        return False
    if bias is not None and bias.name and not is_weight_constant(bias):
        return False
    grouped = node.op == "ConvTranspose" and node.attrs.get("group", 1) != 1
    return not grouped and not (node.op == "Gemm" and node.attrs.get("beta", 1.0) == 0.0)


def _affine(graph: Graph, node: gs.Node, follower: gs.Node) -> tuple[Array, Array] | None:
    """Return per-channel ``(scale, shift)`` in float64 when ``follower`` computes ``scale * y + shift``."""
    channels = int(node.inputs[1].shape[_output_axis(node)])
    if operator(follower) == "BatchNormalization":
        return _batch_norm(graph, follower, channels)
    if operator(follower) not in ("Mul", "Add"):
        return None
    other: Any = next((tensor for tensor in follower.inputs if tensor is not node.outputs[0]), None)
    if not is_weight_constant(other) or other.dtype not in _FLOAT_TYPES:
        return None
    values = _per_channel(values_of(graph, other), channels, len(node.inputs[1].shape))
    if values is None:
        return None
    return (values, np.zeros(channels)) if follower.op == "Mul" else (np.ones(channels), values)


def _batch_norm(graph: Graph, node: gs.Node, channels: int) -> tuple[Array, Array] | None:
    statistics = node.inputs[1:5]
    if len(statistics) < 4 or not all(is_weight_constant(each) and each.dtype in _FLOAT_TYPES for each in statistics):
        return None
    extra = [tensor for tensor in node.outputs[1:] if tensor.name]
    if extra or node.attrs.get("training_mode", 0):
        return None
    gamma, beta, mean, variance = (values_of(graph, each).astype(np.float64) for each in statistics)
    if {gamma.shape, beta.shape, mean.shape, variance.shape} != {(channels,)}:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        return scale, beta - mean * scale


def _output_axis(node: gs.Node) -> int:
    """Return the axis of a stored weight that counts output channels."""
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 1 if node.op == "ConvTranspose" else 0


def _per_channel(values: Array, channels: int, rank: int) -> Array | None:
    """Return a broadcast constant as one float64 value per channel (axis 1 of the output), ``None`` if it is more."""
    if values.ndim > rank:
        return None
    if values.size == 1:
        return np.full(channels, float(values.reshape(-1)[0]))
    shape = (1,) * (rank - values.ndim) + values.shape
    return values.reshape(-1).astype(np.float64) if shape == (1, channels) + (1,) * (rank - 2) else None


def _apply(graph: Graph, node: gs.Node, scale: Array, shift: Array) -> bool:
    """Scale a layer's weight and set its bias; False (and nothing changed) where the result would not be finite."""
    weight = node.inputs[1]
    values = values_of(graph, weight)
    spread = [1] * values.ndim
    spread[_output_axis(node)] = -1
    beta = node.attrs.get("beta", 1.0) if node.op == "Gemm" else 1.0
    old = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    bias = values_of(graph, old).astype(np.float64) if old is not None else np.zeros(1)
    with np.errstate(over="ignore", invalid="ignore"):
        new_weight = (values * scale.reshape(spread)).astype(values.dtype)
        new_bias = (bias * scale + shift / beta).astype(values.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return False
    weight.values = new_weight
    if old is not None and len(old.outputs) == 1 and old.name not in graph.output_names | graph.body_names:
        name = old.name
    else:
        name = fresh_name(graph, f"{weight.name}.bias")
    constant = gs.Constant(name, new_bias)
    if len(node.inputs) > 2:
        node.inputs[2] = constant
    else:
        node.inputs.append(constant)
    return True
