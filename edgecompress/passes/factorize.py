"""Find the factorized form of layers and replace each layer's node by the nodes of its form."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.factorize.forms import LowRank, Spectral
from edgecompress.factorize.solve import solve_layer
from edgecompress.graph import Graph, fresh_name, replace_nodes
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.run import Change
from edgecompress.passes.steps import composed, conv_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgecompress.factorize.rank import Form
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.moments import Moments
    from edgecompress.plan import Plan

_FIRST_OPSET_WITH_FREE_BIAS = 11


def factorize(graph: Graph, layers: Sequence[Layer], forms: Mapping[str, Form]) -> Sequence[Change]:
    """Rewrite every layer that has a form. Its factors are ``<name>.0`` (applied first), ``<name>.1``, ..."""
    changes: list[Change] = []
    replaced: dict[int, list[gs.Node]] = {}
    for layer in layers:
        if layer.name not in forms:
            continue
        form = forms[layer.name]
        if layer.op == "Conv":  # several convolutions never share a factorized weight
            factors, replaced[id(layer.nodes[0])] = _convolutions(graph, layer, form)
        else:
            assert isinstance(form, LowRank)
            factors = [first, second] = _matrices(graph, layer, form)
            for node in layer.nodes:
                replaced[id(node)] = _PRODUCTS[layer.op](graph, node, first, second)
        names = tuple(factor.name for factor in factors)
        dense = functools.partial(_stored_dense, form, layer)
        changes.append(Change(layer.name, type(form).__name__, dense=dense, tensors=names))
    replace_nodes(graph, replaced)
    return changes


def _stored_dense(form: Form, layer: Layer) -> Array:
    return stored(form.to_dense(), layer)


def _constant(graph: Graph, layer: Layer, step: int, values: Array) -> gs.Constant:
    return gs.Constant(fresh_name(graph, f"{layer.name}.{step}"), np.ascontiguousarray(values))


def _convolutions(graph: Graph, layer: Layer, form: Form) -> tuple[list[gs.Constant], list[gs.Node]]:
    """Return the factors and the chain of Conv nodes that takes a layer's place."""
    (node,) = layer.nodes
    assert not isinstance(form, Spectral)  # not a chain of convolutions; no plan names it
    steps = conv_steps(form, node.attrs)
    factors = [_constant(graph, layer, number, step.weight) for number, step in enumerate(steps)]
    tensors = [_between(graph, node, factor) for factor in factors[:-1]]
    inputs, outputs = _take_over(node)
    sources, results = [inputs[0], *tensors], [*([tensor] for tensor in tensors), outputs]
    nodes = [
        gs.Node("Conv", _named(node, number), attrs=step.attributes, inputs=[source, factor], outputs=result)
        for number, (step, factor, source, result) in enumerate(zip(steps, factors, sources, results, strict=True))
    ]
    nodes[-1].inputs.extend(inputs[2:])
    return factors, nodes


def _matrices(graph: Graph, layer: Layer, form: LowRank) -> list[gs.Constant]:
    """Return the two factors of a matrix in the orientation that the layer's nodes want."""
    right, left = form.right, form.left
    if layer.orientation == "transposed":
        right, left = right.T, left.T
    return [_constant(graph, layer, 0, right), _constant(graph, layer, 1, left)]


def _between(graph: Graph, node: gs.Node, factor: gs.Constant) -> gs.Variable:
    """Return the tensor between the two new nodes."""
    return gs.Variable(fresh_name(graph, f"{node.outputs[0].name}.{factor.name}"), dtype=factor.dtype)


def _take_over(node: gs.Node) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """Unlink a node and return the inputs and outputs it had."""
    inputs, outputs = list(node.inputs), list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    return inputs, outputs


def _matmul(graph: Graph, node: gs.Node, first: gs.Constant, second: gs.Constant) -> list[gs.Node]:
    middle = _between(graph, node, first)
    (left, right), outputs = _take_over(node)
    on_right = isinstance(right, gs.Constant)
    steps = ([left, first], [middle, second]) if on_right else ([first, right], [second, middle])
    return [
        gs.Node("MatMul", _named(node, 0), inputs=steps[0], outputs=[middle]),
        gs.Node("MatMul", _named(node, 1), inputs=steps[1], outputs=outputs),
    ]


def _gemm(graph: Graph, node: gs.Node, first: gs.Constant, second: gs.Constant) -> list[gs.Node]:
    middle = _between(graph, node, first)
    inputs, outputs = _take_over(node)
    transposed = {"transB": node.attrs.get("transB", 0)}
    before = {**transposed, "transA": node.attrs.get("transA", 0)}
    after = {**transposed, "alpha": node.attrs.get("alpha", 1.0), "beta": node.attrs.get("beta", 1.0)}
    enter = [inputs[0], first]
    if graph.model.opset < _FIRST_OPSET_WITH_FREE_BIAS:
        enter.append(gs.Constant(fresh_name(graph, f"{first.name}.zero"), np.zeros(1, first.dtype)))
    return [
        gs.Node("Gemm", _named(node, 0), attrs=before, inputs=enter, outputs=[middle]),
        gs.Node("Gemm", _named(node, 1), attrs=after, inputs=[middle, second, *inputs[2:]], outputs=outputs),
    ]


def _named(node: gs.Node, step: int) -> str:
    return f"{node.name}.{step}" if node.name else ""


_PRODUCTS = {"MatMul": _matmul, "Gemm": _gemm}


def dense_of(parts: Sequence[Array], layer: Layer) -> Array:
    """Multiply the factors of a layer, given as stored in the graph, out to its canonical weight."""
    if len(parts) == 1:
        return parts[0]
    turned = layer.orientation == "transposed"
    return composed([part.T for part in parts] if turned else parts)


def solve_forms(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Plan,
    moments: Mapping[str, Moments],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Form]:
    """Find the factors of every layer that the plan factorizes. Raises ``ModelError`` for NaN or Inf weights."""
    wanted = {entry.layer: entry.factorize for entry in plan.layers if entry.factorize is not None}
    forms: dict[str, Form] = {}
    for layer in layers:
        asked = wanted.get(layer.name)
        if asked is None:
            continue
        known = moments.get(layer.name) if asked.calibrated else None
        forms[layer.name] = solve_layer(asked.scheme, read_weight(graph, layer), asked.ranks, known)
        if progress:
            progress(len(forms), len(wanted))
    return forms
