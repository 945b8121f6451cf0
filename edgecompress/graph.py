"""The graph that passes edit: onnx-graphsurgeon's, tied to the file it came from, so that nothing it says is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues
from onnx_graphsurgeon.logger import G_LOGGER

from edgecompress.errors import ModelError
from edgecompress.model import Array, Model
from edgecompress.tensors import copy_fields, nested_graphs, tensor_values

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

G_LOGGER.severity = G_LOGGER.ERROR

_FIRST_IR_WITH_FREE_INITIALIZERS = 4


@dataclass
class Graph:
    """A private, editable copy of a model's graph. Weight payloads are shared with the model and never written to.

    ``origins`` maps ``id(node)`` to the node as the file has it: a node that no pass replaced is written back with its
    attributes, nested graphs, doc_string and metadata untouched. A pass may rewire such a node's inputs and outputs; to
    change an attribute it makes a new node.

    ``names`` are all tensor names in use, ``output_names`` those that the model gives, ``body_names`` those that the
    bodies of control-flow nodes use. ``added`` holds the constants that a pass made of other tensors: bodies may use
    them, too.
    """

    surgeon: gs.Graph
    model: Model
    origins: dict[int, onnx.NodeProto]
    names: set[str]
    output_names: frozenset[str]
    body_names: frozenset[str]
    added: dict[str, gs.Constant]


def open_graph(model: Model) -> Graph:
    """Open a model for editing. Raises ``ModelError`` for a graph that cannot be followed."""
    source = model.proto.graph
    try:
        surgeon = gs.import_onnx(_decodable(model.proto))
    except Exception as error:
        raise ModelError(f"{model.path}: the graph is malformed: {error}", hint="export the model again") from error
    origins = {id(node): proto for node, proto in zip(surgeon.nodes, source.node, strict=True)}
    bodies = [_names_in(nested) for node in source.node for nested in nested_graphs(node)]
    return Graph(
        surgeon=surgeon,
        model=model,
        origins=origins,
        names=_names_in(source),
        output_names=frozenset(value.name for value in source.output),
        body_names=frozenset().union(*bodies),
        added={},
    )


def _decodable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the message, without the attributes that hold bytes: graphsurgeon reads every text as UTF-8.

    They belong to custom operators and are only hidden from passes: ``origins`` has them.
    """
    if not any(_holds_bytes(attribute) for node in _all_nodes(proto.graph) for attribute in node.attribute):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for node in _all_nodes(copy.graph):
        kept = [attribute for attribute in node.attribute if not _holds_bytes(attribute)]
        del node.attribute[:]
        node.attribute.extend(kept)
    return copy


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        for nested in nested_graphs(node):
            yield from _all_nodes(nested)
        yield node


def _holds_bytes(attribute: onnx.AttributeProto) -> bool:
    try:
        b"".join((attribute.s, *attribute.strings)).decode()
    except UnicodeDecodeError:
        return True
    return False


def _names_in(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in (*graph.initializer, *graph.input, *graph.output)}
    names.update(sparse.values.name for sparse in graph.sparse_initializer)
    for node in graph.node:
        names.update(node.input)
        names.update(node.output)
        for nested in nested_graphs(node):
            names |= _names_in(nested)
    return names


def operator(node: gs.Node) -> str:
    """Return the type of a node of the standard operator set, ``""`` for all others."""
    return str(node.op) if node.domain in (None, "", "ai.onnx") else ""


def values_of(graph: Graph, constant: gs.Constant) -> Array:
    """Return a constant's values without caching them in the graph (an external payload is mapped from its file)."""
    stored = constant._values  # the public property would load lazily stored values for good
    return tensor_values(stored.tensor, graph.model.folder) if isinstance(stored, LazyValues) else np.asarray(stored)


def is_weight_constant(tensor: Any) -> bool:
    """Tell whether a tensor is a dense constant."""
    return isinstance(tensor, gs.Constant) and not isinstance(tensor._values, SparseValues)


def constants(graph: Graph) -> dict[str, gs.Constant]:
    """Return the dense constants that top-level nodes use, and those that passes added, by name."""
    used = (tensor for node in graph.surgeon.nodes for tensor in node.inputs if isinstance(tensor, gs.Constant))
    return {tensor.name: tensor for tensor in (*graph.added.values(), *used) if is_weight_constant(tensor)}


def replace_nodes(graph: Graph, replacements: dict[int, list[gs.Node]]) -> None:
    """Replace nodes, given by ``id``, with lists of nodes at the same place (an empty list removes)."""
    kept: list[gs.Node] = []
    for node in graph.surgeon.nodes:
        kept.extend(replacements.get(id(node), [node]))
    graph.surgeon.nodes = kept


def fresh_name(graph: Graph, wanted: str) -> str:
    """Return ``wanted``, or the first of ``wanted_2``, ``wanted_3``, ... that is not in use, and mark it as used."""
    name, number = wanted, 1
    while name in graph.names:
        number += 1
        name = f"{wanted}_{number}"
    graph.names.add(name)
    return name


def close_graph(graph: Graph) -> Model:
    """Write the edited graph back into a copy of its model.

    Initializers that nothing uses any more are dropped; metadata, doc strings, functions and value infos stay.
    Initializers stop being overridable inputs (the runtime folds only true constants), which needs IR version 4.
    """
    source = graph.model.proto
    proto = onnx.ModelProto()
    copy_fields(source, proto, leave_out=("graph",))
    nodes = [_node_proto(graph, node) for node in graph.surgeon.nodes]
    produced = {name for node in nodes for name in node.output}
    initializers = list(_initializers(graph, _used_names(nodes) | graph.output_names, produced))
    copy_fields(source.graph, proto.graph, leave_out=("node", "initializer", "input", "value_info"))
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(initializers)
    known = {sparse.values.name for sparse in source.graph.sparse_initializer}
    added = [each._values for each in graph.added.values() if isinstance(each, gs.Constant)]
    proto.graph.sparse_initializer.extend(each.tensor for each in added if isinstance(each, SparseValues))
    overridable = known | {tensor.name for tensor in source.graph.initializer}
    proto.graph.input.extend(value for value in source.graph.input if value.name not in overridable)
    alive = produced | known | {tensor.name for tensor in initializers}
    proto.graph.value_info.extend(value for value in source.graph.value_info if value.name in alive)
    proto.ir_version = max(source.ir_version, _FIRST_IR_WITH_FREE_INITIALIZERS)
    return Model(graph.model.path, proto)


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


def _initializers(graph: Graph, used: set[str], produced: set[str]) -> Iterator[onnx.TensorProto]:
    """Yield the dense initializers: the file's own in their order, then new ones in the order of their first use."""
    current = constants(graph)
    for tensor in graph.model.proto.graph.initializer:
        constant = current.pop(tensor.name, None)
        if tensor.name in used and tensor.name not in produced:
            yield tensor if constant is None else _tensor_proto(constant)
    for name, constant in current.items():
        if name in used and name not in produced:
            yield _tensor_proto(constant)


def _tensor_proto(constant: gs.Constant) -> onnx.TensorProto:
    if not isinstance(constant._values, LazyValues):
        return onnx.numpy_helper.from_array(np.asarray(constant._values, order="C"), constant.name)
    tensor = constant._values.tensor
    if tensor.name == constant.name:
        return tensor
    renamed = onnx.TensorProto()
    renamed.CopyFrom(tensor)
    renamed.name = constant.name
    return renamed


_KEEPS_INTEGERS = (
    "Cast",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Identity",
    "Slice",
    "Concat",
    "Flatten",
    "Expand",
)


def integer_limits(graph: Graph) -> dict[str, int]:
    """Return, per integer input, the length of the smallest Gather table that it indexes: its values stay below."""
    limits: dict[str, int] = {}
    for source in graph.surgeon.inputs:
        pending, seen = [source], {source.name}
        while pending:
            tensor = pending.pop()
            for node in tensor.outputs:
                if operator(node) == "Gather" and node.inputs[1] is tensor:
                    size = _table_length(node)
                    if size is not None:
                        limits[source.name] = min(size, limits.get(source.name, size))
                elif operator(node) in _KEEPS_INTEGERS and node.outputs[0].name not in seen:
                    seen.add(node.outputs[0].name)
                    pending.append(node.outputs[0])
    return limits


def _table_length(node: gs.Node) -> int | None:
    """Return how many entries the table of a Gather node has; ``None`` where it is not a constant."""
    table, axis = node.inputs[0], node.attrs.get("axis", 0)
    known = isinstance(table, gs.Constant) and -len(table.shape) <= axis < len(table.shape)
    return int(table.shape[axis]) if known else None
