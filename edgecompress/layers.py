"""Find the layers of a graph: which nodes have weights, in which orientation, how many parameters and MACs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from edgecompress.graph import Graph, is_weight_constant, operator
from edgecompress.macs import Extent, Shapes, count_macs, find_extent
from edgecompress.model import infer_shapes, signature
from edgecompress.operands import (
    FLOAT_TYPES,
    RECURRENT_OPS,
    WEIGHT_INPUTS,
    constant_behind,
    entering,
    is_fed_constants,
    live_tensors,
    not_stored,
    why_fixed,
    why_skipped,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import onnx_graphsurgeon as gs

Op = Literal["Gemm", "MatMul", "Conv", "ConvTranspose", "LSTM", "GRU", "Gather"]
Orientation = Literal["as_is", "transposed", "deconvolution", "directions"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One weight and the nodes that use it.

    ``shape`` is canonical: ``(C_out, C_in / groups, *kernel)``, where the directions of a recurrent weight are groups;
    tables keep their own shape.
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
        """Whether what the weight multiplies is to be had, whose second moment says how much each value matters."""
        is_stack = self.op == "MatMul" and len(self.shape) > 2
        if self.op == "Gather" or is_stack or self.is_mixed:
            return False
        return all(entering(node, self.constant) is not None for node in self.nodes)


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
    live = live_tensors(graph)
    for node in graph.surgeon.nodes:
        for entry in _entries(node, shapes, live):
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


def _entries(node: gs.Node, shapes: Shapes, live: Collection[str]) -> Iterator[Layer | Skip]:
    """Yield the weights of one node; none of a node that helps to compute a constant: it is no layer of the model."""
    op = operator(node)
    if not any(tensor.name in live for tensor in (*node.inputs, *node.outputs)) and not is_fed_constants(node):
        return
    for position in WEIGHT_INPUTS.get(op, ()):
        tensor = node.inputs[position] if position < len(node.inputs) else None
        if tensor is None or not tensor.name:
            continue
        if not is_weight_constant(tensor):
            found = not_stored(op, tensor, live)
            if found is not None:
                yield _skip(tensor.name, op, *found)
            continue
        if op in ("MatMul", "Gather") and len(tensor.shape) < 2:
            continue  # a vector; a look-up of a shape or of one of our own codebooks
        if op == "Gather" and tensor.dtype not in FLOAT_TYPES:
            continue
        yield _layer(node, position, tensor, shapes)
        if op == "MatMul":
            return


def _layer(node: gs.Node, position: int, tensor: gs.Constant, shapes: Shapes) -> Layer | Skip:
    shape = tuple(int(size) for size in tensor.shape)
    reason = why_skipped(node, position, tensor)
    if reason is not None:
        return _skip(tensor.name, node.op, shape, reason)
    groups = shape[0] if node.op in RECURRENT_OPS else int(node.attrs.get("group", 1))
    orientation = _orientation(node, position)
    if orientation == "transposed":
        canonical_shape: tuple[int, ...] = (*shape[:-2], shape[-1], shape[-2])
    elif orientation == "deconvolution":
        canonical_shape = (shape[1] * groups, shape[0] // groups, *shape[2:])
    elif orientation == "directions":
        canonical_shape = (shape[0] * shape[1], shape[2])
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
        fixed_form=why_fixed(node.op, canonical_shape, groups),
        extents=None if extent is None else (extent,),
    )


def _skip(name: str, op: str, shape: tuple[int, ...], reason: str) -> Skip:
    return Skip(name=name, op=op, shape=shape, parameters=math.prod(shape) if shape else 0, reason=reason)


def _orientation(node: gs.Node, position: int) -> Orientation:
    if node.op == "ConvTranspose":
        return "deconvolution"
    if node.op in RECURRENT_OPS:
        return "directions"
    right = node.op == "MatMul" and position == 1
    return "transposed" if right or (node.op == "Gemm" and not node.attrs.get("transB", 0)) else "as_is"


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
            for position in WEIGHT_INPUTS.get(operator(node), ()):
                tensor: Any = node.inputs[position] if position < len(node.inputs) else None
                constant = constant_behind(tensor)
                if constant is None or constant.dtype not in FLOAT_TYPES or len(constant.shape) < 2:
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
