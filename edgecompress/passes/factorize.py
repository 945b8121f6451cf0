"""Find the low-rank form of layers and replace each layer's node by the two nodes of its form."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.factorize.forms import LowRank
from edgecompress.factorize.svd import calibrated_svd, plain_svd
from edgecompress.graph import Graph, fresh_name, replace_nodes
from edgecompress.orientation import read_weight, stored
from edgecompress.passes.run import Change

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.moments import Moments
    from edgecompress.plan import Plan

_FIRST_OPSET_WITH_FREE_BIAS = 11


def factorize(graph: Graph, layers: Sequence[Layer], forms: Mapping[str, LowRank]) -> Sequence[Change]:
    """Rewrite every layer that has a form. The factors are the constants ``<name>.0`` (applied first) and ``<name>.1``."""
    changes: list[Change] = []
    replaced: dict[int, list[gs.Node]] = {}
    for layer in layers:
        if layer.name not in forms:
            continue
        form = forms[layer.name]
        first, second = _factors(graph, layer, form)
        for node in layer.nodes:
            replaced[id(node)] = _NODES[layer.op](graph, node, first, second)
        dense = functools.partial(_stored_dense, form, layer)
        changes.append(Change(layer.name, f"low rank {form.rank}", dense=dense, tensors=(first.name, second.name)))
    replace_nodes(graph, replaced)
    return changes


def _stored_dense(form: LowRank, layer: Layer) -> Array:
    return stored(form.to_dense(), layer)


def _factors(graph: Graph, layer: Layer, form: LowRank) -> tuple[gs.Constant, gs.Constant]:
    """Return the two factors as constants in the orientation that the layer's nodes want."""
    right, left = form.right, form.left
    if layer.op == "Conv":
        left = left.reshape(*left.shape, *(1,) * (right.ndim - 2))
    elif layer.orientation == "transposed":
        right, left = right.T, left.T
    first, second = (fresh_name(graph, f"{layer.name}.{step}") for step in (0, 1))
    return gs.Constant(first, np.ascontiguousarray(right)), gs.Constant(second, np.ascontiguousarray(left))


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


def _conv(graph: Graph, node: gs.Node, first: gs.Constant, second: gs.Constant) -> list[gs.Node]:
    middle = _between(graph, node, first)
    inputs, outputs = _take_over(node)
    pointwise = {"kernel_shape": list(second.shape[2:])}
    spatial = {name: value for name, value in node.attrs.items() if value != []}  # an empty list has no type to write
    return [
        gs.Node("Conv", _named(node, 0), attrs=spatial, inputs=[inputs[0], first], outputs=[middle]),
        gs.Node("Conv", _named(node, 1), attrs=pointwise, inputs=[middle, second, *inputs[2:]], outputs=outputs),
    ]


def _named(node: gs.Node, step: int) -> str:
    return f"{node.name}.{step}" if node.name else ""


_NODES = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv}


def dense_of(parts: Sequence[Array], layer: Layer) -> Array:
    """Multiply the factors of a layer, given as stored in the graph, out to its canonical weight."""
    if len(parts) == 1:
        return parts[0]
    right, left = parts
    if layer.op == "Conv":
        left = left.reshape(left.shape[:2])
    elif layer.orientation == "transposed":
        right, left = right.T, left.T
    return LowRank(left, right).to_dense()


def solve_low_rank(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Plan,
    moments: Mapping[str, Moments],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, LowRank]:
    """Find the factors of every layer that the plan factorizes. Raises ``ModelError`` for NaN or Inf weights."""
    wanted = {entry.layer: entry.factorize for entry in plan.layers if entry.factorize is not None}
    forms: dict[str, LowRank] = {}
    for layer in layers:
        asked = wanted.get(layer.name)
        if asked is None:
            continue
        weight = read_weight(graph, layer)
        known = moments.get(layer.name)
        if asked.calibrated and known is not None:
            forms[layer.name] = calibrated_svd(weight, asked.rank, known)
        else:
            forms[layer.name] = plain_svd(weight, asked.rank)
        if progress:
            progress(len(forms), len(wanted))
    return forms
