"""Write weights of few values as what rebuilds them, in operators that the runtime folds when a session starts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompress.cluster.forms import Clustered, Grid
from edgecompress.graph import Graph, constants, fresh_name
from edgecompress.orientation import stored
from edgecompress.passes.decoders import insert_decoders
from edgecompress.passes.run import Change
from edgecompress.values import Values, reshaped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.layers import Layer


def write_values(graph: Graph, forms: Mapping[str, Values]) -> Sequence[Change]:
    """Replace constants by what rebuilds them: the tensor keeps its name, so every use stays as it is.

    Clusters become ``Gather(codebook, Cast(indices))``, a grid ``Mul(Cast(codes), step)``. ``forms`` are keyed by the
    constant's name and shaped as it is stored.
    """
    changes: list[Change] = []
    decoders: dict[str, list[gs.Node]] = {}
    present = constants(graph)
    for name, form in forms.items():
        if isinstance(form, Clustered):
            decoders[name], tensors = _write_clusters(graph, present[name], form)
        else:
            decoders[name], tensors = _write_grid(graph, present[name], form)
        changes.append(Change(name, scheme_of(form), dense=form.to_dense, tensors=tensors))
    insert_decoders(graph, decoders)
    return changes


def _write_clusters(graph: Graph, weight: gs.Constant, form: Clustered) -> tuple[list[gs.Node], tuple[str, ...]]:
    codebook = gs.Constant(fresh_name(graph, f"{weight.name}.codebook"), form.codebook)
    indices = gs.Constant(fresh_name(graph, f"{weight.name}.indices"), form.indices)
    wide = gs.Variable(fresh_name(graph, f"{weight.name}.positions"), dtype=np.int32)
    weight.to_variable(dtype=form.codebook.dtype, shape=list(form.indices.shape))
    nodes = [
        gs.Node("Cast", attrs={"to": onnx.TensorProto.INT32}, inputs=[indices], outputs=[wide]),
        gs.Node("Gather", attrs={"axis": 0}, inputs=[codebook, wide], outputs=[weight]),
    ]
    return nodes, (codebook.name, indices.name)


def _write_grid(graph: Graph, weight: gs.Constant, form: Grid) -> tuple[list[gs.Node], tuple[str, ...]]:
    step = gs.Constant(fresh_name(graph, f"{weight.name}.step"), form.step)
    codes = gs.Constant(fresh_name(graph, f"{weight.name}.codes"), form.codes)
    units = gs.Variable(fresh_name(graph, f"{weight.name}.units"), dtype=form.step.dtype)
    weight.to_variable(dtype=form.step.dtype, shape=list(form.codes.shape))
    kind = int(onnx.helper.np_dtype_to_tensor_dtype(form.step.dtype))
    nodes = [
        gs.Node("Cast", attrs={"to": kind}, inputs=[codes], outputs=[units]),
        gs.Node("Mul", inputs=[units, step], outputs=[weight]),
    ]
    return nodes, (step.name, codes.name)


def scheme_of(form: Values) -> str:
    """Return the scheme and the number of values, for people."""
    if isinstance(form, Clustered):
        return f"kmeans {form.codebook.size}"
    return f"grid {len(np.unique(form.codes))}"


def values_as_stored(values: Values, layer: Layer, shape: tuple[int, ...]) -> Values:
    """Return the canonical values of a layer, or of one of its factors, as the graph stores them, in ``shape``.

    The step of a grid is one number, whatever the orientation.
    """
    if layer.op == "Conv":  # factors of a convolution are kernels, with axes of size 1 added
        return reshaped(values, shape)
    if isinstance(values, Clustered):
        return replace(values, indices=np.ascontiguousarray(stored(values.indices, layer)))
    return replace(values, codes=np.ascontiguousarray(stored(values.codes, layer)))
