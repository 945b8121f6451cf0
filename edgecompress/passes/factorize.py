"""Replace each layer's node by the nodes of its factorized form, or its weight by nodes that rebuild it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.factorize.factors import Form, factors, with_factors
from edgecompress.factorize.forms import AffineLowRank, LowRank, Spectral
from edgecompress.graph import Graph, fresh_name, replace_nodes
from edgecompress.orientation import bias_of, canonical, stored
from edgecompress.passes.decoders import Cosines, insert_decoders
from edgecompress.passes.run import Change
from edgecompress.passes.steps import ConvForm, conv_steps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.layers import Layer
    from edgecompress.model import Array

_FIRST_OPSET_WITH_FREE_BIAS = 11


def factorize(graph: Graph, layers: Sequence[Layer], forms: Mapping[str, Form]) -> Sequence[Change]:
    """Rewrite every layer that has a form. Its factors are ``<name>.0`` (applied first), ``<name>.1``, ...

    A ``Spectral`` weight keeps its name and is rebuilt from ``<name>.coefficients``; an ``AffineLowRank`` moves the
    layer's bias to ``<name>.bias``, between its factors.
    """
    changes: list[Change] = []
    replaced: dict[int, list[gs.Node]] = {}
    decoders: dict[str, list[gs.Node]] = {}
    cosines = Cosines(graph)
    for layer in layers:
        if layer.name not in forms:
            continue
        form = forms[layer.name]
        old_bias = bias_of(layer) if isinstance(form, AffineLowRank) else None
        if isinstance(form, Spectral):
            coefficients, decoders[layer.name] = cosines.decoder(layer, form)
            parts = [coefficients]
        elif layer.op == "Conv":  # several convolutions never share a factorized weight
            parts, replaced[id(layer.nodes[0])] = _convolutions(graph, layer, form)
        else:
            assert isinstance(form, LowRank | AffineLowRank)
            parts = _matrices(graph, layer, form)
            for node in layer.nodes:
                replaced[id(node)] = _PRODUCTS[layer.op](graph, node, parts, _inner_bias(graph, layer, form))
        names = tuple(part.name for part in parts)
        dense = functools.partial(_stored_dense, form, layer)
        changes.append(Change(layer.name, type(form).__name__, dense=dense, tensors=names))
        if isinstance(form, AffineLowRank) and old_bias is not None:
            dense = functools.partial(_dense_bias, form, tuple(old_bias.shape))
            changes.append(Change(old_bias.name, "absorbed", dense=dense))
    replace_nodes(graph, replaced)
    insert_decoders(graph, decoders)
    return changes


def _stored_dense(form: Form, layer: Layer) -> Array:
    return stored(form.to_dense(), layer)


def _dense_bias(form: AffineLowRank, shape: tuple[int, ...]) -> Array:
    return form.bias_to_dense().reshape(shape)


def _constant(graph: Graph, layer: Layer, step: int, values: Array) -> gs.Constant:
    return gs.Constant(fresh_name(graph, f"{layer.name}.{step}"), np.ascontiguousarray(values))


def _convolutions(graph: Graph, layer: Layer, form: ConvForm) -> tuple[list[gs.Constant], list[gs.Node]]:
    """Return the factors and the chain of Conv nodes that takes a layer's place."""
    (node,) = layer.nodes
    steps = conv_steps(form, node.attrs)
    parts = [_constant(graph, layer, number, step.weight) for number, step in enumerate(steps)]
    tensors = [_between(graph, node, part) for part in parts[:-1]]
    inner = _inner_bias(graph, layer, form)
    inputs, outputs = _take_over(node)
    sources, results = [inputs[0], *tensors], [*([tensor] for tensor in tensors), outputs]
    nodes = [
        gs.Node("Conv", _named(node, number), attrs=step.attributes, inputs=[source, part], outputs=result)
        for number, (step, part, source, result) in enumerate(zip(steps, parts, sources, results, strict=True))
    ]
    if inner is None:
        nodes[-1].inputs.extend(inputs[2:])
    else:
        nodes[0].inputs.append(inner)
    return parts, nodes


def _inner_bias(graph: Graph, layer: Layer, form: Form) -> gs.Constant | None:
    """Return what the first step of a form adds, ``None`` where the bias stays behind the last one."""
    if not isinstance(form, AffineLowRank):
        return None
    return gs.Constant(fresh_name(graph, f"{layer.name}.bias"), np.ascontiguousarray(form.bias))


def _matrices(graph: Graph, layer: Layer, form: LowRank | AffineLowRank) -> list[gs.Constant]:
    """Return the two factors of a matrix in the orientation that the layer's nodes want."""
    return [_constant(graph, layer, step, stored(part, layer)) for step, part in enumerate(factors(form))]


def _between(graph: Graph, node: gs.Node, factor: gs.Constant) -> gs.Variable:
    """Return the tensor between the two new nodes."""
    return gs.Variable(fresh_name(graph, f"{node.outputs[0].name}.{factor.name}"), dtype=factor.dtype)


def _take_over(node: gs.Node) -> tuple[list[gs.Tensor], list[gs.Tensor]]:
    """Unlink a node and return the inputs and outputs it had."""
    inputs, outputs = list(node.inputs), list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    return inputs, outputs


def _matmul(graph: Graph, node: gs.Node, parts: Sequence[gs.Constant], inner: gs.Constant | None) -> list[gs.Node]:
    assert inner is None  # a MatMul has no bias to absorb
    first, second = parts
    middle = _between(graph, node, first)
    (left, right), outputs = _take_over(node)
    on_right = isinstance(right, gs.Constant)
    steps = ([left, first], [middle, second]) if on_right else ([first, right], [second, middle])
    return [
        gs.Node("MatMul", _named(node, 0), inputs=steps[0], outputs=[middle]),
        gs.Node("MatMul", _named(node, 1), inputs=steps[1], outputs=outputs),
    ]


def _gemm(graph: Graph, node: gs.Node, parts: Sequence[gs.Constant], inner: gs.Constant | None) -> list[gs.Node]:
    first, second = parts
    middle = _between(graph, node, first)
    inputs, outputs = _take_over(node)
    transposed = {"transB": node.attrs.get("transB", 0)}
    before = {**transposed, "transA": node.attrs.get("transA", 0)}
    after = {**transposed, "alpha": node.attrs.get("alpha", 1.0), "beta": node.attrs.get("beta", 1.0)}
    enter, leave = [inputs[0], first], [middle, second]
    if inner is None:
        leave.extend(inputs[2:])
    else:
        enter.append(inner)
    for step in (enter, leave):
        if len(step) < 3 and graph.model.opset < _FIRST_OPSET_WITH_FREE_BIAS:
            step.append(gs.Constant(fresh_name(graph, f"{first.name}.zero"), np.zeros(1, first.dtype)))
    return [
        gs.Node("Gemm", _named(node, 0), attrs=before, inputs=enter, outputs=[middle]),
        gs.Node("Gemm", _named(node, 1), attrs=after, inputs=leave, outputs=outputs),
    ]


def _named(node: gs.Node, step: int) -> str:
    return f"{node.name}.{step}" if node.name else ""


_PRODUCTS = {"MatMul": _matmul, "Gemm": _gemm}


def dense_of(parts: Sequence[Array], layer: Layer, form: Form) -> Array:
    """Multiply the constants that hold a layer's ``form``, given as stored in the graph, out to its canonical weight.

    They may differ from the factors of ``form`` in their values, not in their shapes.
    """
    if layer.op != "Conv":
        parts = [canonical(part, layer) for part in parts]
    shapes = [factor.shape for factor in factors(form)]
    arrays = [np.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    return with_factors(form, arrays).to_dense()
