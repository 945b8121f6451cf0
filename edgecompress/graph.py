"""The graph that passes edit: onnx-graphsurgeon's, tied to the file it came from, so that nothing the file says is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from edgecompress.errors import ModelError
from edgecompress.model import Array, Model, nested_graphs, tensor_values

G_LOGGER.severity = G_LOGGER.ERROR

_FIRST_IR_WITH_FREE_INITIALIZERS = 4


@dataclass
class Graph:
    """A private, editable copy of a model's graph. Weight payloads are shared with the model and never written to.

    ``origins`` maps ``id(node)`` to the node as the file has it: a node that no pass replaced is written back with its
    attributes, nested graphs, doc_string and metadata untouched. A pass may rewire such a node's inputs and outputs; to
    change an attribute it makes a new node.
    """

    surgeon: gs.Graph
    model: Model
    origins: dict[int, onnx.NodeProto]


def open_graph(model: Model) -> Graph:
    """Open a model for editing. Raises ``ModelError`` for a graph that cannot be followed."""
    try:
        surgeon = gs.import_onnx(model.proto)
    except Exception as error:
        raise ModelError(f"{model.path}: the graph is malformed: {error}", hint="export the model again") from error
    origins = {id(node): proto for node, proto in zip(surgeon.nodes, model.proto.graph.node, strict=True)}
    return Graph(surgeon, model, origins)


def values_of(graph: Graph, constant: gs.Constant) -> Array:
    """Return a constant's values without caching them in the graph (an external payload is mapped from its file)."""
    stored = constant._values  # the public property would load lazily stored values for good
    return tensor_values(stored.tensor, graph.model.folder) if isinstance(stored, LazyValues) else np.asarray(stored)


def is_weight_constant(tensor: Any) -> bool:
    """Tell whether a tensor is a dense constant."""
    return isinstance(tensor, gs.Constant) and (isinstance(tensor._values, (LazyValues, np.ndarray)))


def constants(graph: Graph) -> dict[str, gs.Constant]:
    """Return the constants that top-level nodes use, by name."""
    found: dict[str, gs.Constant] = {}
    for node in graph.surgeon.nodes:
        for tensor in node.inputs:
            if is_weight_constant(tensor):
                found.setdefault(tensor.name, tensor)
    return found


def replace_nodes(graph: Graph, replacements: dict[int, list[gs.Node]]) -> None:
    """Replace nodes, given by ``id``, with lists of nodes at the same place (an empty list removes)."""
    kept: list[gs.Node] = []
    for node in graph.surgeon.nodes:
        kept.extend(replacements.get(id(node), [node]))
    graph.surgeon.nodes = kept


def fresh_name(graph: Graph, wanted: str) -> str:
    """Return ``wanted``, or the first of ``wanted_2``, ``wanted_3``, ... that no tensor in any graph of the model has."""
    taken = _names_in(graph.model.proto.graph)
    taken.update(tensor.name for node in graph.surgeon.nodes for tensor in [*node.inputs, *node.outputs])
    name, number = wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    return name


def _names_in(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in [*graph.initializer, *graph.input, *graph.output]}
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
        for nested in nested_graphs(node):
            names |= _names_in(nested)
    return names


def close_graph(graph: Graph) -> Model:
    """Write the edited graph back into a copy of its model.

    Initializers that nothing uses any more are dropped; metadata, doc strings, functions and value infos stay.
    Initializers stop being overridable inputs (the runtime folds only true constants), which needs IR version 4.
    """
    source = graph.model.proto
    proto = onnx.ModelProto()
    for field, value in source.ListFields():
        if field.name != "graph":
            _assign(proto, field.name, value)
    nodes = [_node_proto(graph, node) for node in graph.surgeon.nodes]
    used = _used_names(nodes) | {value.name for value in source.graph.output}
    initializers = list(_initializers(graph, used))
    stored = {tensor.name for tensor in initializers}
    for field, value in source.graph.ListFields():
        if field.name not in ("node", "initializer", "input", "value_info"):
            _assign(proto.graph, field.name, value)
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(initializers)
    overridable = {tensor.name for tensor in source.graph.initializer}
    proto.graph.input.extend(value for value in source.graph.input if value.name not in overridable)
    alive = {name for node in nodes for name in node.output} | stored
    proto.graph.value_info.extend(value for value in source.graph.value_info if value.name in alive)
    proto.ir_version = max(source.ir_version, _FIRST_IR_WITH_FREE_INITIALIZERS)
    return Model(graph.model.path, proto)


def _assign(message: Any, name: str, value: Any) -> None:
    """Copy one field of a message, whatever its kind."""
    if hasattr(value, "add") or isinstance(value, (list, tuple)) or hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _node_proto(graph: Graph, node: gs.Node) -> onnx.NodeProto:
    origin = graph.origins.get(id(node))
    if origin is None:
        return OnnxExporter.export_node(node)
    proto = onnx.NodeProto()
    proto.CopyFrom(origin)
    proto.ClearField("input")
    proto.ClearField("output")
    proto.input.extend(tensor.name for tensor in node.inputs)
    proto.output.extend(tensor.name for tensor in node.outputs)
    return proto


def _used_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    used: set[str] = set()
    for node in nodes:
        used.update(node.input)
        for nested in nested_graphs(node):
            used |= _used_names(nested.node) | {value.name for value in nested.output}
    return used


def _initializers(graph: Graph, used: set[str]) -> Iterator[onnx.TensorProto]:
    """Yield the dense initializers: the file's own in their order, then new ones in the order of their first use."""
    produced = {tensor.name for node in graph.surgeon.nodes for tensor in node.outputs}
    current = constants(graph)
    for tensor in graph.model.proto.graph.initializer:
        if tensor.name in used and tensor.name not in produced:
            yield _tensor_proto(current.pop(tensor.name, None), tensor)
    sparse = {tensor.values.name for tensor in graph.model.proto.graph.sparse_initializer}
    for name, constant in current.items():
        if name in used and name not in produced and name not in sparse:
            yield _tensor_proto(constant, None)


def _tensor_proto(constant: gs.Constant | None, origin: onnx.TensorProto | None) -> onnx.TensorProto:
    if constant is None:
        assert origin is not None
        return origin
    if isinstance(constant._values, LazyValues):
        tensor = constant._values.tensor
        if tensor.name == constant.name:
            return tensor
        renamed = onnx.TensorProto()
        renamed.CopyFrom(tensor)
        renamed.name = constant.name
        return renamed
    return onnx.numpy_helper.from_array(np.ascontiguousarray(constant._values), constant.name)


_KEEPS_INTEGERS = ("Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Slice", "Concat", "Flatten", "Expand")


def integer_limits(graph: Graph) -> dict[str, int]:
    """Return, per integer input, the length of the smallest Gather table that it indexes (its values must stay below)."""
    limits: dict[str, int] = {}
    for source in graph.surgeon.inputs:
        pending, seen = [source], {source.name}
        while pending:
            tensor = pending.pop()
            for node in tensor.outputs:
                if node.op == "Gather" and node.inputs[1] is tensor and isinstance(node.inputs[0], gs.Constant):
                    size = int(node.inputs[0].shape[node.attrs.get("axis", 0)])
                    limits[source.name] = min(size, limits.get(source.name, size))
                elif node.op in _KEEPS_INTEGERS and node.outputs[0].name not in seen:
                    seen.add(node.outputs[0].name)
                    pending.append(node.outputs[0])
    return limits
