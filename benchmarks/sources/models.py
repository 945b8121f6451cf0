"""ONNX models in the hands of the sources' recipes: weights out and in, rewritten by edgecompress' own passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx

from edgecompress.cluster.forms import Clustered
from edgecompress.graph import Graph, open_graph
from edgecompress.layers import Layer, find_layers
from edgecompress.model import Array, Model
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.factorize import factorize
from edgecompress.passes.run import Change, run_pass
from edgecompress.passes.weights import write_values

if TYPE_CHECKING:
    from edgecompress.factorize.factors import Form


def layers_of(graph: Graph) -> list[Layer]:
    """Return the layers of a graph that can be compressed, in its order."""
    return [entry for entry in find_layers(graph) if isinstance(entry, Layer)]


def weights_of(model: Model) -> dict[str, Array]:
    """Return the canonical weights by layer."""
    graph = open_graph(model)
    return {layer.name: read_weight(graph, layer) for layer in layers_of(graph)}


def factorized(
    model: Model, forms: Mapping[str, Form], feeds: Mapping[str, Array] | None = None
) -> tuple[Model, Sequence[Change]]:
    """Rewrite layers to their forms; with ``feeds`` the result is checked against the dense oracle."""
    return run_pass(model, "factorize", lambda graph: factorize(graph, layers_of(graph), forms), feeds)


def clustered(model: Model, forms: Mapping[str, Clustered]) -> Model:
    """Replace weights by codebooks and indices; ``forms`` have canonical shapes."""
    layers = {layer.name: layer for layer in layers_of(open_graph(model))}
    turned = {
        name: Clustered(form.codebook, np.ascontiguousarray(stored(form.indices, layers[name])))
        for name, form in forms.items()
    }
    return run_pass(model, "kmeans", lambda graph: write_values(graph, turned), None)[0]


def with_weights(model: Model, weights: Mapping[str, Array]) -> Model:
    """Return the model with other canonical weights."""
    layers = {layer.name: layer for layer in layers_of(open_graph(model))}
    return with_values(model, {name: stored(values, layers[name]) for name, values in weights.items()})


def with_values(model: Model, values: Mapping[str, Array]) -> Model:
    """Return the model with other initializers, in the shapes and types in which they are stored."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            content = np.ascontiguousarray(values[tensor.name]).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(content, tensor.name))
    return Model(model.path, proto)


def sizes_of(model: Model) -> dict[str, int]:
    """Return how many values each initializer holds."""
    return {tensor.name: int(np.prod(tensor.dims, dtype=np.int64)) for tensor in model.proto.graph.initializer}
