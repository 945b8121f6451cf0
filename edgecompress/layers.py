"""Find the layers of a graph: which nodes have weights, in which orientation, how many parameters and MACs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.graph import Graph, is_weight_constant, operator
from edgecompress.macs import Extent, Shapes, count_macs, find_extent
from edgecompress.model import infer_shapes, signature
from edgecompress.tensors import type_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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
_RANKS = {  # of the stored weight, least and most
    "Gemm": (2, 2),
    "MatMul": (2, 99),
    "Conv": (3, 99),
    "ConvTranspose": (3, 99),
    "LSTM": (3, 3),
    "GRU": (3, 3),
    "Gather": (2, 99),
}
_FLOAT_TYPES = (np.float16, np.float32, np.float64)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight and the nodes that use it.

    ``shape`` is canonical: ``(C_out, C_in / groups, *kernel)``; recurrent weights and tables keep their own shape.
    ``macs`` are multiply-accumulates of one run of the model, ``None`` where a shape is unknown.
    ``fixed_form`` says why the layer may be clustered but not factorized, ``None`` where it may be. ``is_mixed``: the
    nodes that share the weight differ in kind, orientation or groups. ``extents`` say where each node applies the
    weight, ``None`` where a shape is unknown or the layer is none that is factorized.
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
    extents: tuple[Extent, ...] | None
    is_mixed: bool = False

    @property
    def takes_moments(self) -> bool:
        """Whether the inputs' second moment says how the output depends on each weight."""
        is_stack = self.op == "MatMul" and len(self.shape) > 2
        return self.op in FACTORIZABLE_OPS and not is_stack and not self.is_mixed


@dataclass(frozen=True, kw_only=True)
class Skip:
    """A weight that is left alone, and why."""

    name: str
    op: str
    shape: tuple[int, ...]
    parameters: int
    reason: str


def find_layers(graph: Graph, free: Mapping[str, tuple[int, ...]] | None = None) -> list[Layer | Skip]:
    """Return the layers in graph order, one entry per weight, however many nodes share it; those of bodies come last.

    ``free`` gives the input shapes that MACs are counted for; by default free dimensions are 1 (batch) and 8.
    """
    shapes = infer_shapes(graph.model.proto, free or default_shapes(graph))
    found: dict[str, Layer | Skip] = {}
    for node in graph.surgeon.nodes:
        for entry in _entries(node, shapes):
            found[entry.name] = _shared(found[entry.name], entry) if entry.name in found else entry
    entries = [entry if isinstance(entry, Skip) else _with_other_uses(graph, entry) for entry in found.values()]
    return [*entries, *_nested_weights(graph, found)]


def default_shapes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Return the input shapes with free dimensions set to 1 for the leading axis and 8 elsewhere."""
    inputs, _ = signature(graph.model.proto)
    return {
        spec.name: tuple(size if size is not None else (8 if axis else 1) for axis, size in enumerate(spec.shape))
        for spec in inputs
    }


def _entries(node: gs.Node, shapes: Shapes) -> Iterator[Layer | Skip]:
    """Yield the weights of one node."""
    op = operator(node)
    for position in _WEIGHT_INPUTS.get(op, ()):
        tensor = node.inputs[position] if position < len(node.inputs) else None
        if tensor is None or not tensor.name:
            continue
        if not is_weight_constant(tensor):
            skip = _not_stored(op, tensor)
            if skip is not None:
                yield skip
            continue
        if op in ("MatMul", "Gather") and len(tensor.shape) < 2:
            continue  # a vector; a look-up of a shape or of one of our own codebooks
        if op == "Gather" and tensor.dtype not in _FLOAT_TYPES:
            continue
        yield _layer(node, position, tensor, shapes)
        if op == "MatMul":
            return


def _layer(node: gs.Node, position: int, tensor: gs.Constant, shapes: Shapes) -> Layer | Skip:
    shape = tuple(int(size) for size in tensor.shape)
    reason = _why_skipped(node, position, tensor)
    if reason is not None:
        return _skip(tensor.name, node.op, shape, reason)
    groups = int(node.attrs.get("group", 1))
    orientation = _orientation(node, position)
    if orientation == "transposed":
        canonical_shape: tuple[int, ...] = (*shape[:-2], shape[-1], shape[-2])
    elif orientation == "deconvolution":
        canonical_shape = (shape[1] * groups, shape[0] // groups, *shape[2:])
    else:
        canonical_shape = shape
    extent = find_extent(node, position, shapes)
    return Layer(
        name=tensor.name,
        op=node.op,
        shape=canonical_shape,
        parameters=math.prod(shape),
        macs=count_macs(node, position, shape, shapes),
        orientation=orientation,
        groups=groups,
        nodes=(node,),
        constant=tensor,
        fixed_form=_why_fixed(node.op, canonical_shape, groups),
        extents=None if extent is None else (extent,),
    )


def _why_skipped(node: gs.Node, position: int, tensor: gs.Constant) -> str | None:
    """Say why a constant at a weight's place cannot be compressed at all."""
    shape = tuple(tensor.shape)
    if tensor.dtype not in _FLOAT_TYPES:
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


def _skip(name: str, op: str, shape: tuple[int, ...], reason: str) -> Skip:
    return Skip(name=name, op=op, shape=shape, parameters=math.prod(shape) if shape else 0, reason=reason)


def _orientation(node: gs.Node, position: int) -> Orientation:
    if node.op == "ConvTranspose":
        return "deconvolution"
    right = node.op == "MatMul" and position == 1
    return "transposed" if right or (node.op == "Gemm" and not node.attrs.get("transB", 0)) else "as_is"


def _why_fixed(op: str, shape: tuple[int, ...], groups: int) -> str | None:
    if op not in FACTORIZABLE_OPS:
        return f"{op} weights are clustered, never factorized"
    if op == "MatMul" and len(shape) > 2:
        return "a stack of matrices is not factorized"
    if groups > 1 and shape[1] == 1:
        return "a depthwise convolution is not factorized"
    if groups > 1 and shape[0] == groups:
        return "a convolution with one output per group is not factorized"
    return None


def _not_stored(op: str, tensor: gs.Tensor) -> Skip | None:
    """Return the entry of a weight that is not a dense constant, ``None`` where it is no weight but an activation."""
    if isinstance(tensor, gs.Constant):
        return _skip(tensor.name, op, tuple(tensor.shape), "it is stored as a sparse tensor")
    producer = tensor.inputs[0] if tensor.inputs else None
    indices = _codebook_indices(producer)
    if indices is not None:
        return _skip(tensor.name, op, tuple(indices.shape), "it is a codebook with indices already")
    if op != "Gather" and producer is not None and _is_constant(tensor):
        return _skip(tensor.name, op, (), f"a {producer.op} node computes it from constants")
    if op not in ("MatMul", "Gemm", "Gather"):
        return _skip(tensor.name, op, (), "it is computed while the model runs")
    return None


def _codebook_indices(producer: Any) -> gs.Constant | None:
    """Return the indices where a node looks values up in a codebook: ``Gather(codebook, Cast(indices))``."""
    if producer is None or operator(producer) != "Gather" or not is_weight_constant(producer.inputs[0]):
        return None
    for cast in producer.inputs[1].inputs:
        if cast.op == "Cast" and is_weight_constant(cast.inputs[0]) and len(producer.inputs[0].shape) == 1:
            return cast.inputs[0]
    return None


def _is_constant(tensor: gs.Tensor, depth: int = 12) -> bool:
    """Tell whether a tensor is a constant, or computed from constants alone in at most ``depth`` steps."""
    if isinstance(tensor, gs.Constant) or not tensor.inputs or not depth:
        return isinstance(tensor, gs.Constant)
    return all(_is_constant(source, depth - 1) for source in tensor.inputs[0].inputs if source.name)


def _shared(first: Layer | Skip, second: Layer | Skip) -> Layer | Skip:
    """Join the entries of two nodes that use the same weight."""
    if isinstance(first, Skip) or isinstance(second, Skip):
        return first if isinstance(first, Skip) else second
    macs = None if first.macs is None or second.macs is None else first.macs + second.macs
    extents = None if first.extents is None or second.extents is None else (*first.extents, *second.extents)
    first = replace(first, nodes=(*first.nodes, *second.nodes), macs=macs, extents=extents)
    if (first.op, first.orientation, first.groups) == (second.op, second.orientation, second.groups):
        fixed = "several convolutions share this weight" if first.op == "Conv" else None
        return replace(first, fixed_form=first.fixed_form or fixed)
    why = first.fixed_form or second.fixed_form or "nodes of different kinds share this weight"
    return replace(first, fixed_form=why, is_mixed=True)


def _with_other_uses(graph: Graph, layer: Layer) -> Layer:
    """Fix the form of a weight that something else needs as it is: factors would come on top, not in its place."""
    if layer.name in graph.body_names:
        why = "the body of a control-flow node uses this weight too"
    elif layer.name in graph.output_names:
        why = "the model gives this weight as an output"
    elif len(layer.constant.outputs) != len(layer.nodes):
        why = "nodes of other kinds use this weight too"
    else:
        return layer
    return replace(layer, fixed_form=layer.fixed_form or why)


def _nested_weights(graph: Graph, found: Mapping[str, Layer | Skip]) -> Iterator[Skip]:
    """Yield the weights of nodes inside control-flow bodies, but for those that top-level nodes use as well.

    Bodies may use a name twice (both branches of an If): the second one is reported as ``<name>_2``.
    """
    seen: dict[str, gs.Constant] = {}
    for body in graph.surgeon.subgraphs(recursive=True):
        for node in body.nodes:
            for position in _WEIGHT_INPUTS.get(operator(node), ()):
                tensor: Any = node.inputs[position] if position < len(node.inputs) else None
                constant = _constant_behind(tensor)
                if constant is None or constant.dtype not in _FLOAT_TYPES or len(constant.shape) < 2:
                    continue
                entry = found.get(tensor.name)
                if isinstance(entry, Layer) and entry.constant is constant:
                    continue
                name, number = tensor.name, 1
                while name in found or (name in seen and seen[name] is not constant):
                    number += 1
                    name = f"{tensor.name}_{number}"
                if name not in seen:
                    seen[name] = constant
                    yield _skip(
                        name, node.op, tuple(constant.shape), "it is used in the body of an If, Loop or Scan node"
                    )


def _constant_behind(tensor: Any) -> gs.Constant | None:
    """Return the dense constant that a tensor is, or that the Constant node that makes it holds."""
    if is_weight_constant(tensor):
        return tensor
    producer = tensor.inputs[0] if getattr(tensor, "inputs", None) else None
    value = producer.attrs.get("value") if producer is not None and operator(producer) == "Constant" else None
    return value if is_weight_constant(value) else None
