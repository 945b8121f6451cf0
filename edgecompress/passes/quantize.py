"""Run layers in int8: codes in the place of weights, and activations rounded to 8 bits, in the form that runtimes fuse.

A weight becomes ``DequantizeLinear(codes, step)``, an activation passes ``QuantizeLinear`` and ``DequantizeLinear``. A
runtime that knows the form computes with integers between the two, any other one computes the same in floats.

Activations are uint8 with a zero point, weights int8 without (Jacob et al. 2018): x86 has its products for this pair.
Processors with AVX2 but no VNNI add two such products in 16 bits and cut sums off at 32767, which takes a pair of codes
that add up to 129 or more: codes of a grid are far smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.cluster.forms import Grid
from edgecompress.graph import Graph, fresh_name, operator, values_of
from edgecompress.orientation import bias_of, check_finite
from edgecompress.passes.decoders import insert_decoders
from edgecompress.passes.flow import Flow, flow_of
from edgecompress.passes.run import Change

if TYPE_CHECKING:
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.passes.ranges import Range

_MAX_CODE = 127
_MAX_INT32 = 2**31 - 1
_FAR = 3e38


def quantize(
    graph: Graph, layers: Sequence[Layer], ranges: Mapping[str, Range], grids: Mapping[str, Grid]
) -> Sequence[Change]:
    """Make ``layers``, for which ``why_float`` is None, run in int8.

    ``ranges`` are those of ``flow_of(graph, layers).ranged``, or of more tensors. ``grids`` are by constant and shaped
    as it is stored: such a weight keeps exactly its codes; all others get 8 bits and one step for each output. The
    constants that hold a weight are ``<name>.codes`` and ``<name>.step``. A bias that only this layer has becomes
    integers, in steps of the activation's times the weight's. Raises ``ModelError`` for NaN or Inf weights.
    """
    writer = _Writer(graph, flow_of(graph, layers), ranges)
    changes: list[Change] = []
    for layer in layers:
        changes += writer.weight(layer, grids.get(layer.name) or eight_bits(graph, layer))
    writer.activations()
    insert_decoders(graph, writer.decoders)
    return changes


def eight_bits(graph: Graph, layer: Layer) -> Grid:
    """Return a weight on a grid, as it is stored, with a step for each output that takes its largest value to 127."""
    values = values_of(graph, layer.constant)
    check_finite(layer.name, values)
    others = tuple(axis for axis in range(values.ndim) if axis != _output_axis(layer))
    step = np.abs(values).max(axis=others, keepdims=True) / np.float32(_MAX_CODE)
    step = np.where(step > 0, step, np.float32(1.0))
    return Grid(step, np.clip(np.rint(values / step), -_MAX_CODE, _MAX_CODE).astype(np.int8))


def _output_axis(layer: Layer) -> int:
    """Return the axis of the outputs in a weight as it is stored."""
    return 1 if layer.orientation == "transposed" else 0


class _Writer:
    """Writes the nodes of one graph; small constants are shared among them."""

    def __init__(self, graph: Graph, flow: Flow, ranges: Mapping[str, Range]) -> None:
        self._graph, self._flow, self._ranges = graph, flow, ranges
        self._shared: dict[tuple[object, ...], gs.Constant] = {}
        self.decoders: dict[str, list[gs.Node]] = {}
        """The nodes that rebuild each weight and bias."""

    def weight(self, layer: Layer, grid: Grid) -> list[Change]:
        """Store a layer's weight as codes, and its bias where that is its own."""
        step = grid.step.reshape(-1) if grid.step.ndim else grid.step
        names = self._integers(layer.constant, grid.codes, step, _output_axis(layer))
        changes = [Change(layer.name, "int8", grid.to_dense, names)]
        bias = bias_of(layer)
        if bias is None or len(bias.shape) != 1 or bias.name in self._graph.output_names | self._graph.body_names:
            return changes
        bias_step = np.asarray(self._range(layer.nodes[0].inputs[0].name).scale * step)
        rounded = np.rint(values_of(self._graph, bias) / bias_step.astype(np.float64))
        if np.abs(rounded).max() > _MAX_INT32:
            return changes
        bias_grid = partial(np.multiply, rounded.astype(np.float32), bias_step)
        names = self._integers(bias, rounded.astype(np.int32), bias_step, 0)
        return [*changes, Change(bias.name, "int32", bias_grid, names)]

    def activations(self) -> None:
        """Round the activations that int8 layers read and give."""
        nodes: list[gs.Node] = []
        behind = {id(node): name for name, node in self._flow.made.items()}
        runs_in_int8 = set(map(id, self._flow.nodes))
        rounded: dict[str, gs.Variable] = {}
        for node in self._graph.surgeon.nodes:
            if id(node) in runs_in_int8:
                for place, tensor in enumerate(node.inputs):
                    if tensor.name in self._flow.taken:
                        if tensor.name not in rounded:
                            rounded[tensor.name] = self._variable(f"{tensor.name}.rounded", np.float32)
                            nodes += self._pair(tensor.name, tensor, rounded[tensor.name])
                            self._hold(nodes)
                        node.inputs[place] = rounded[tensor.name]
            nodes.append(node)
            if id(node) in behind:
                tensor, exact = node.outputs[0], self._variable(f"{node.outputs[0].name}.exact", np.float32)
                node.outputs[0] = exact
                nodes += self._pair(behind[id(node)], exact, tensor)
        self._graph.surgeon.nodes = nodes

    def _pair(self, name: str, source: gs.Tensor, result: gs.Variable) -> list[gs.Node]:
        span = self._range(name)
        scale, zero_point = (self._constant(kind, getattr(span, kind)) for kind in ("scale", "zero_point"))
        codes = self._variable(f"{name}.codes", np.uint8)
        return [
            gs.Node("QuantizeLinear", inputs=[source, scale, zero_point], outputs=[codes]),
            gs.Node("DequantizeLinear", inputs=[codes, scale, zero_point], outputs=[result]),
        ]

    def _hold(self, nodes: list[gs.Node]) -> None:
        """Keep the runtime from rounding before a float MaxPool what is rounded behind it.

        It has no fast MaxPool for integers in the order of floats (13 times slower), and moves a QuantizeLinear over
        one; not over a Clip, which it drops later on where the range of the integers does the same.
        """
        rounding = nodes[-2]
        source = rounding.inputs[0]
        if not source.inputs or operator(source.inputs[0]) != "MaxPool":
            return
        held = self._variable(f"{source.name}.held", np.float32)
        limits = [self._constant("limit", np.asarray(each, np.float32)) for each in (-_FAR, _FAR)]
        rounding.inputs[0] = held
        nodes.insert(-2, gs.Node("Clip", inputs=[source, *limits], outputs=[held]))

    def _integers(self, constant: gs.Constant, values: Array, step: Array, axis: int) -> tuple[str, ...]:
        """Replace a constant by integers times a step; return the names of what is stored."""
        shape = list(constant.shape)
        codes = gs.Constant(fresh_name(self._graph, f"{constant.name}.codes"), values)
        scale = gs.Constant(fresh_name(self._graph, f"{constant.name}.step"), step)
        # onnxruntime 1.31 does not fuse a Gemm whose weight has no zero point.
        zeros = [self._constant("zeros", np.zeros(step.shape, np.int8))] if values.dtype == np.int8 else []
        constant.to_variable(dtype=np.float32, shape=shape)
        attributes = {"axis": axis} if step.ndim else {}
        self.decoders[constant.name] = [
            gs.Node("DequantizeLinear", attrs=attributes, inputs=[codes, scale, *zeros], outputs=[constant])
        ]
        return codes.name, scale.name

    def _range(self, name: str) -> Range:
        while name in self._flow.same:
            name = self._flow.same[name]
        return self._ranges[name]

    def _variable(self, name: str, kind: type) -> gs.Variable:
        return gs.Variable(fresh_name(self._graph, name), dtype=kind)

    def _constant(self, name: str, values: Array) -> gs.Constant:
        values = np.asarray(values)
        key = values.dtype, values.shape, values.tobytes()
        if key not in self._shared:
            self._shared[key] = gs.Constant(fresh_name(self._graph, f"int8.{name}"), values)
        return self._shared[key]
