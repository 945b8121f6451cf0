"""Find the layers of a graph: which nodes have weights, in which orientation, how many parameters and MACs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.errors import ModelError
from edgecompress.graph import Graph, is_weight_constant, values_of
from edgecompress.model import Array, infer_shapes, signature

Op = Literal["Gemm", "MatMul", "Conv", "ConvTranspose", "LSTM", "GRU", "Gather"]
Orientation = Literal["as_is", "transposed", "deconvolution"]

FACTORIZABLE_OPS = ("Gemm", "MatMul", "Conv")

# Which inputs of a node are weights. The biases of LSTM and GRU (input 3) are too small to be worth a codebook.
_WEIGHT_INPUTS: dict[str, tuple[int, ...]] = {
    "Gemm": (1,),
    "MatMul": (1, 0),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "Gather": (0,),
}
_FLOAT_TYPES = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight and the nodes that use it.

    ``shape`` is canonical: ``(C_out, C_in / groups, *kernel)``; recurrent weights and tables keep their own shape.
    ``macs`` are multiply-accumulates of one run of the model, ``None`` where a shape is unknown.
    ``fixed_form`` says why the layer may be clustered but not factorized, ``None`` where it may be.
    """

    name: str
    op: Op
    shape: tuple[int, ...]
    parameters: int
    macs: int | None
    orientation: Orientation
    groups: int
    nodes: tuple[gs.Node, ...]
    constant: gs.Constant
    fixed_form: str | None


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A weight that is left alone, and why."""

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    reason: str


def find_layers(graph: Graph, free: Mapping[str, tuple[int, ...]] | None = None) -> list[Layer | Skip]:
    """Return the layers in graph order, one entry per weight, however many nodes share it.

    ``free`` gives the input shapes that MACs are counted for; by default free dimensions are 1 (batch) and 8.
    """
    shapes = infer_shapes(graph.model.proto, free or default_shapes(graph))
    found: dict[str, Layer | Skip] = {}
    for node in graph.surgeon.nodes:
        for entry in _entries(node, shapes):
            found[entry.name] = _shared(found[entry.name], entry) if entry.name in found else entry
    for skip in _nested_weights(graph):
        found[skip.name] = skip if skip.name not in found else _used_in_body(found[skip.name])
    return list(found.values())


def default_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Return the input shapes with free dimensions set to 1 for the leading axis and 8 elsewhere."""
    inputs, _ = signature(graph.model.proto)
    return {
        spec.name: tuple(size if size is not None else (8 if axis else 1) for axis, size in enumerate(spec.shape))
        for spec in inputs
    }


def read_weight(graph: Graph, layer: Layer) -> Array:
    """Return a layer's weight in canonical orientation. Raises ``ModelError`` where it holds NaN or Inf."""
    values = values_of(graph, layer.constant)
    check_finite(layer.name, values)
    return canonical(values, layer)


def check_finite(name: str, values: Array) -> None:
    """Raise ``ModelError`` where ``values`` hold NaN or Inf; memory stays bounded for mapped weights."""
    flat = values.reshape(-1)
    step = 1 << 22
    bad = sum(int(np.count_nonzero(~np.isfinite(flat[start : start + step]))) for start in range(0, flat.size, step))
    if bad:
        raise ModelError(
            f"weight {name!r} holds {bad} NaN or Inf values", hint="the model is damaged; export it again from its source"
        )


def canonical(values: Array, layer: Layer) -> Array:
    """Turn stored weight values into ``(C_out, C_in / groups, *kernel)``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":  # stored as (C_in, C_out / groups, *kernel)
        grouped = values.reshape(layer.groups, values.shape[0] // layer.groups, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.shape)
    return values


def stored(values: Array, layer: Layer) -> Array:
    """Undo ``canonical``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":
        out = values.shape[0] // layer.groups
        grouped = values.reshape(layer.groups, out, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.groups * values.shape[1], out, *values.shape[2:])
    return values


def _entries(node: gs.Node, shapes: Mapping[str, tuple[int | None, ...]]) -> Iterator[Layer | Skip]:
    """Yield the weights of one node."""
    if node.domain not in (None, "", "ai.onnx"):
        return
    for position in _WEIGHT_INPUTS.get(node.op, ()):
        tensor = node.inputs[position] if position < len(node.inputs) else None
        if tensor is None or not tensor.name:
            continue
        if not is_weight_constant(tensor):
            reason = _why_not_constant(node, tensor)
            if reason is not None:
                yield Skip(name=tensor.name, op=node.op, shape=(), parameters=0, reason=reason)
            continue
        if node.op == "Gather" and (len(tensor.shape) < 2 or tensor.dtype not in _FLOAT_TYPES):
            continue  # a look-up of a shape or of one of our own codebooks, not a table of vectors
        if node.op == "MatMul" and len(tensor.shape) < 2:
            continue
        yield _layer(node, position, tensor, shapes)
        if node.op == "MatMul":
            return


def _layer(node: gs.Node, position: int, tensor: gs.Constant, shapes: Mapping[str, Any]) -> Layer | Skip:
    shape, parameters = tuple(int(size) for size in tensor.shape), int(np.prod(tensor.shape, dtype=np.int64))
    if tensor.dtype not in _FLOAT_TYPES:
        reason = f"its type {tensor.dtype} is not float16, float32 or float64"
        return Skip(name=tensor.name, op=node.op, shape=shape, parameters=parameters, reason=reason)
    if parameters == 0:
        return Skip(name=tensor.name, op=node.op, shape=shape, parameters=0, reason="it is empty")
    orientation = _orientation(node, position)
    layer = Layer(
        name=tensor.name,
        op=node.op,
        shape=shape,
        parameters=parameters,
        macs=_macs(node, position, shape, shapes),
        orientation=orientation,
        groups=int(node.attrs.get("group", 1)),
        nodes=(node,),
        constant=tensor,
        fixed_form=None,
    )
    layer = replace(layer, shape=_canonical_shape(layer))
    return replace(layer, fixed_form=_why_fixed(layer))


def _orientation(node: gs.Node, position: int) -> Orientation:
    if node.op == "ConvTranspose":
        return "deconvolution"
    right = node.op == "MatMul" and position == 1
    return "transposed" if right or (node.op == "Gemm" and not node.attrs.get("transB", 0)) else "as_is"


def _canonical_shape(layer: Layer) -> tuple[int, ...]:
    shape = layer.shape
    if layer.orientation == "transposed":
        return (*shape[:-2], shape[-1], shape[-2])
    if layer.orientation == "deconvolution":
        return (shape[1] * layer.groups, shape[0] // layer.groups, *shape[2:])
    return shape


def _why_fixed(layer: Layer) -> str | None:
    if layer.op not in FACTORIZABLE_OPS:
        return f"{layer.op} weights are clustered, never factorized"
    if layer.op == "MatMul" and len(layer.shape) > 2:
        return "a stack of matrices is not factorized"
    if layer.groups > 1:
        kind = "depthwise" if layer.shape[1] == 1 else "grouped"
        return f"a {kind} convolution is not factorized"
    return None


def _macs(node: gs.Node, position: int, shape: tuple[int, ...], shapes: Mapping[str, Any]) -> int | None:
    """Count the multiply-accumulates of one node for one weight."""
    result, data = shapes.get(node.outputs[0].name), shapes.get(node.inputs[0].name)
    count = int(np.prod(shape, dtype=np.int64))
    if node.op == "Gather":
        return 0
    if node.op in ("LSTM", "GRU"):
        return count * _product(data[:2]) if data and None not in data[:2] else None
    if node.op == "ConvTranspose":
        return count * data[0] * _product(data[2:]) if data and None not in data else None
    if result is None or None in result:
        return None
    if node.op == "Conv":
        return count * int(result[0]) * _product(result[2:])
    inner = shape[-1] if (node.op == "MatMul" and position == 0) or node.attrs.get("transB", 0) else shape[-2]
    return _product(result) * inner


def _product(sizes: tuple[int, ...]) -> int:
    return int(np.prod(sizes, dtype=np.int64))


def _why_not_constant(node: gs.Node, tensor: gs.Tensor) -> str | None:
    """Say why a weight that is not a constant is skipped; ``None`` where it is no weight at all but an activation."""
    producer = tensor.inputs[0] if getattr(tensor, "inputs", None) else None
    if producer is None or not any(is_weight_constant(source) for source in producer.inputs[:1]):
        fixed = node.op not in ("MatMul", "Gather", "Gemm")
        return "its weight is computed while the model runs" if fixed else None
    if node.op == "Gather":
        return None
    return f"its weight is the output of a {producer.op} node, not stored as floats"


def _shared(first: Layer | Skip, second: Layer | Skip) -> Layer | Skip:
    """Join the entries of two nodes that use the same weight."""
    if isinstance(first, Skip) or isinstance(second, Skip):
        return first
    macs = None if first.macs is None or second.macs is None else first.macs + second.macs
    fixed = first.fixed_form or second.fixed_form
    if fixed is None and (first.op, first.orientation) != (second.op, second.orientation):
        fixed = "nodes of different kinds share this weight"
    if first.op == "Conv" and fixed is None:
        fixed = "several convolutions share this weight"
    return replace(first, nodes=(*first.nodes, *second.nodes), macs=macs, fixed_form=fixed)


def _used_in_body(entry: Layer | Skip) -> Layer | Skip:
    if isinstance(entry, Skip):
        return entry
    return replace(entry, fixed_form="the body of a control-flow node uses this weight too")


def _nested_weights(graph: Graph) -> Iterator[Skip]:
    """Yield the weights of nodes inside control-flow bodies."""
    for body in graph.surgeon.subgraphs(recursive=True):
        for node in body.nodes:
            for position in _WEIGHT_INPUTS.get(node.op, ()):
                tensor = node.inputs[position] if position < len(node.inputs) else None
                constant = _constant_of(tensor)
                if constant is None or constant.dtype not in _FLOAT_TYPES or len(constant.shape) < 2:
                    continue
                yield Skip(
                    name=tensor.name,
                    op=node.op,
                    shape=tuple(constant.shape),
                    parameters=int(np.prod(constant.shape, dtype=np.int64)),
                    reason="inside the body of a control-flow node (If, Loop or Scan)",
                )


def _constant_of(tensor: Any) -> gs.Constant | None:
    """Return the constant behind a tensor: itself, or the value of the Constant node that makes it."""
    if is_weight_constant(tensor):
        return tensor
    producer = tensor.inputs[0] if getattr(tensor, "inputs", None) else None
    value = producer.attrs.get("value") if producer is not None and producer.op == "Constant" else None
    return value if is_weight_constant(value) else None
