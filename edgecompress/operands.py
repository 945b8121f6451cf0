"""Which inputs of which operators are weights, what such a weight multiplies, and why one cannot be compressed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.graph import Graph, is_weight_constant, operator
from edgecompress.tensors import type_name

if TYPE_CHECKING:
    from collections.abc import Collection

FACTORIZABLE_OPS = ("Gemm", "MatMul", "Conv")
RECURRENT_OPS = ("LSTM", "GRU")

# The biases of LSTM and GRU (input 3) are too small to be worth a codebook.
WEIGHT_INPUTS: dict[str, tuple[int, ...]] = {
    "Gemm": (1,),
    "MatMul": (1, 0),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "Gather": (0,),
}
_RANKS = {  # of the stored weight, least and most
    "Gemm": (2, 2),
    "MatMul": (2, 99),
    "Conv": (3, 99),
    "ConvTranspose": (3, 99),
    "LSTM": (3, 3),
    "GRU": (3, 3),
    "Gather": (2, 99),
}
FLOAT_TYPES = (np.float16, np.float32, np.float64)


def entering(node: gs.Node, weight: gs.Constant) -> gs.Tensor | None:
    """Return the tensor that a weight of a node multiplies, ``None`` where the graph has none.

    For the recurrence of LSTM and GRU that is the hidden state: all that the node gives, one step late.
    """
    if node.op in RECURRENT_OPS and weight is node.inputs[2]:
        return next((tensor for tensor in node.outputs[:2] if tensor.name), None)
    source = next((tensor for tensor in node.inputs if tensor is not weight), None)
    return None if isinstance(source, gs.Constant) else source


def has_weight(node: gs.Node) -> bool:
    """Tell whether a node multiplies by a stored weight."""
    places = () if operator(node) == "Gather" else WEIGHT_INPUTS.get(operator(node), ())
    return any(place < len(node.inputs) and is_weight_constant(node.inputs[place]) for place in places)


def live_tensors(graph: Graph) -> set[str]:
    """Return the tensors that depend on the model's inputs, or may: bodies are not looked into.

    The runtime computes all others when a session starts.
    """
    bodies = [node for node in graph.surgeon.nodes if any(isinstance(each, gs.Graph) for each in node.attrs.values())]
    waiting = [*graph.surgeon.inputs, *(tensor for node in bodies for tensor in node.outputs)]
    live = {tensor.name for tensor in waiting}
    while waiting:
        for node in waiting.pop().outputs:
            fresh = [tensor for tensor in node.outputs if tensor.name not in live]
            live.update(tensor.name for tensor in fresh)
            waiting += fresh
    return live


def is_fed_constants(node: gs.Node) -> bool:
    """Tell whether all inputs of a node are stored, so that it is what some other tool left to be folded."""
    return all(isinstance(tensor, gs.Constant) for tensor in node.inputs if tensor.name)


def why_skipped(node: gs.Node, position: int, tensor: gs.Constant) -> str | None:
    """Say why a constant at a weight's place cannot be compressed at all."""
    shape = tuple(tensor.shape)
    if tensor.dtype not in FLOAT_TYPES:
        name = type_name(tensor.dtype) if isinstance(tensor.dtype, int) else tensor.dtype
        return f"its type {name} is not float16, float32 or float64"
    if not math.prod(shape):
        return "it is empty"
    least, most = _RANKS[node.op]
    if not least <= len(shape) <= most:
        return f"a {node.op} has no weight of shape {list(shape)}"
    groups = node.attrs.get("group", 1)
    if groups < 1 or shape[0] % groups:
        return f"{groups} groups do not divide its {shape[0]} channels"
    if node.op in FACTORIZABLE_OPS and isinstance(node.inputs[0 if position else 1], gs.Constant):
        return "the node's other input is constant too"
    return None


def why_fixed(op: str, shape: tuple[int, ...], groups: int) -> str | None:
    """Say why a weight of this canonical shape may be clustered but not factorized, ``None`` where it may be."""
    if op not in FACTORIZABLE_OPS:
        return f"{op} weights are clustered, never factorized"
    if op == "MatMul" and len(shape) > 2:
        return "a stack of matrices is not factorized"
    if groups > 1 and shape[1] == 1:
        return "a depthwise convolution is not factorized"
    if groups > 1 and shape[0] == groups:
        return "a convolution with one output per group is not factorized"
    return None


def not_stored(op: str, tensor: gs.Tensor, live: Collection[str]) -> tuple[tuple[int, ...], str] | None:
    """Return the shape of a weight that is no dense constant, as far as it is known, and what it is instead.

    ``None`` where it is no weight but an activation.
    """
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape), "it is stored as a sparse tensor"
    producer = tensor.inputs[0] if tensor.inputs else None
    indices = _codebook_indices(producer)
    if indices is not None:
        return tuple(indices.shape), "it is a codebook with indices already"
    if op != "Gather" and producer is not None and tensor.name not in live:
        return (), f"a {producer.op} node computes it from constants"
    if op not in ("MatMul", "Gemm", "Gather"):
        return (), "it is computed while the model runs"
    return None


def _codebook_indices(producer: Any) -> gs.Constant | None:
    """Return the indices where a node looks values up in a codebook: ``Gather(codebook, Cast(indices))``."""
    if producer is None or operator(producer) != "Gather" or not is_weight_constant(producer.inputs[0]):
        return None
    for cast in producer.inputs[1].inputs:
        if cast.op == "Cast" and is_weight_constant(cast.inputs[0]) and len(producer.inputs[0].shape) == 1:
            return cast.inputs[0]
    return None


def constant_behind(tensor: Any) -> gs.Constant | None:
    """Return the dense constant that a tensor is, or that the Constant node that makes it holds."""
    if is_weight_constant(tensor):
        return tensor
    producer = tensor.inputs[0] if getattr(tensor, "inputs", None) else None
    value = producer.attrs.get("value") if producer is not None and operator(producer) == "Constant" else None
    return value if is_weight_constant(value) else None
