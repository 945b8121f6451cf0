"""Nodes that rebuild a weight from what is stored of it, in operators that the runtime folds when a session starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompress.graph import Graph, fresh_name
from edgecompress.orientation import stored

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.factorize.forms import Spectral
    from edgecompress.layers import Layer
    from edgecompress.model import Array


def insert_decoders(graph: Graph, decoders: Mapping[str, Sequence[gs.Node]]) -> None:
    """Put the nodes that make a tensor, given by its name, just before its first use.

    So a runtime that does not fold holds one rebuilt weight at a time, not all. A use inside a control-flow body has no
    place in the list of nodes, so such a weight is rebuilt first.
    """
    places = {id(node): place for place, node in enumerate(graph.surgeon.nodes)}
    ready: dict[int, list[gs.Node]] = {}
    for nodes in decoders.values():
        users = nodes[-1].outputs[0].outputs
        ready.setdefault(min((places.get(id(node), 0) for node in users), default=0), []).extend(nodes)
    nodes = list(graph.surgeon.nodes)
    graph.surgeon.nodes = [new for place, node in enumerate(nodes) for new in (*ready.get(place, ()), node)]


class Cosines:
    """Writes weights as cosine transforms of a block of low frequencies; small constants are shared among them."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._shared: dict[tuple[object, ...], gs.Constant] = {}

    def decoder(self, layer: Layer, form: Spectral) -> tuple[gs.Constant, list[gs.Node]]:
        """Return the constant that holds the coefficients and the nodes that rebuild the layer's weight from them.

        The weight keeps its name and becomes a variable. ``rows^T @ coefficients @ columns`` is computed in float32,
        or in float64 for such a weight, and rounded to the type of the weight.
        """
        weight = layer.constant
        values = np.ascontiguousarray(stored(form.coefficients, layer))
        coefficients = gs.Constant(fresh_name(self._graph, f"{layer.name}.coefficients"), values)
        narrow = values.dtype == np.float16
        kind = np.dtype(np.float32 if narrow else values.dtype)
        flat = weight.shape[0], int(np.prod(weight.shape[1:], dtype=np.int64))
        chain = _Chain(self._graph, layer.name)
        block = chain.add("Cast", kind, coefficients, to=_type(kind)) if narrow else coefficients
        scaled = chain.add("Mul", kind, block, self._scalar(form.gain, kind))
        rows = self._basis(chain, values.shape[0], flat[0], kind, frequencies_first=False)
        half = chain.add("MatMul", kind, rows, scaled)
        columns = self._basis(chain, values.shape[1], flat[1], kind, frequencies_first=True)
        result = chain.add("MatMul", kind, half, columns)
        if len(weight.shape) > 2:
            result = chain.add("Reshape", kind, result, self._constant("shape", np.array(weight.shape, np.int64)))
        if narrow:
            result = chain.add("Cast", values.dtype, result, to=_type(values.dtype))
        weight.to_variable(dtype=values.dtype, shape=list(weight.shape))
        chain.nodes[-1].outputs.clear()
        chain.nodes[-1].outputs.append(weight)
        return coefficients, chain.nodes

    def _basis(
        self, chain: _Chain, count: int, length: int, kind: np.dtype[Any], *, frequencies_first: bool
    ) -> gs.Variable:
        """Return ``cos(pi (2 i + 1) k / (2 N))`` as ``(N, count)``, or ``(count, N)`` with the frequencies first.

        The phase is reduced modulo ``4 N`` as an integer, before it becomes a float of few digits.
        """
        whole = np.dtype(np.int64)
        one, two = self._integer(1), self._integer(2)
        frequency = chain.add("Range", whole, self._integer(0), self._integer(count), one)
        place = chain.add("Range", whole, one, self._integer(2 * length + 1), two)  # 2 i + 1
        column = self._constant("column", np.array([-1, 1], np.int64))
        first, second = (frequency, place) if frequencies_first else (place, frequency)
        product = chain.add("Mul", whole, chain.add("Reshape", whole, first, column), second)
        phase = chain.add("Mod", whole, product, self._integer(4 * length))
        angle = chain.add(
            "Mul", kind, chain.add("Cast", kind, phase, to=_type(kind)), self._scalar(np.pi / (2 * length), kind)
        )
        return chain.add("Cos", kind, angle)

    def _integer(self, value: int) -> gs.Constant:
        return self._constant(str(value), np.array(value, np.int64))

    def _scalar(self, value: float, kind: np.dtype[Any]) -> gs.Constant:
        return self._constant("scale", np.array(value, kind))

    def _constant(self, name: str, values: Array) -> gs.Constant:
        key = values.dtype, values.shape, values.tobytes()
        if key not in self._shared:
            self._shared[key] = gs.Constant(fresh_name(self._graph, f"cosine.{name}"), values)
        return self._shared[key]


class _Chain:
    """Nodes in the order in which they run."""

    def __init__(self, graph: Graph, name: str) -> None:
        self._graph, self._name = graph, name
        self.nodes: list[gs.Node] = []

    def add(self, op: str, kind: np.dtype[Any], *inputs: gs.Tensor, **attributes: int) -> gs.Variable:
        output = gs.Variable(fresh_name(self._graph, f"{self._name}.{op.lower()}"), dtype=kind)
        self.nodes.append(gs.Node(op, attrs=attributes, inputs=list(inputs), outputs=[output]))
        return output


def _type(kind: np.dtype[Any]) -> int:
    return int(onnx.helper.np_dtype_to_tensor_dtype(kind))
