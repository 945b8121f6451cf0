"""Find the layers whose units can be removed: those that just one other layer reads, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgecompress.graph import Graph, is_weight_constant, operator, values_of
from edgecompress.layers import FACTORIZABLE_OPS
from edgecompress.model import infer_shapes

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer
    from edgecompress.macs import Shapes

_ELEMENTWISE = frozenset(
    "Abs Celu Clip Dropout Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Mish Neg Relu Selu Sigmoid "
    "Softplus Softsign Sqrt Tanh ThresholdedRelu".split()
)
_WITH_CONSTANT = frozenset(("Add", "Sub", "Mul", "Div", "PRelu"))
_POOLING = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))


@dataclass(frozen=True)
class Slot:
    """An input of a node that holds a constant with one slice per unit along ``axis``."""

    node: gs.Node
    position: int
    axis: int

    @property
    def constant(self) -> Any:
        """The constant that is there now."""
        return self.node.inputs[self.position]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A layer that can lose units, and the one layer that reads them.

    Each of the ``units`` owns ``block`` inputs of the consumer that lie together in its canonical weight. ``slots`` are
    the constants on the way that go with the units, ``reshape`` the node whose constant shape counts their values.
    """

    layer: Layer
    consumer: Layer
    units: int
    block: int
    slots: tuple[Slot, ...]
    between: tuple[gs.Tensor, ...]
    reshape: gs.Node | None


class _NoPairError(Exception):
    """Says why a layer keeps its units."""


def find_pairs(graph: Graph, layers: Sequence[Layer]) -> dict[str, Pair | str]:
    """Return, by layer, the pair that it makes with the layer that reads it, or why its units cannot be removed.

    A pair holds where the outputs of a Conv, Gemm or MatMul go through activations, operations with one constant per
    unit, pooling and flattening (after a Conv), and nothing else, into one other such layer.
    """
    by_constant = {id(layer.constant): layer for layer in layers}
    shapes = infer_shapes(graph.model.proto, {})
    found: dict[str, Pair | str] = {}
    for layer in layers:
        try:
            found[layer.name] = _pair(graph, layer, by_constant, shapes)
        except _NoPairError as why:
            found[layer.name] = str(why)
    return found


def _pair(graph: Graph, layer: Layer, by_constant: dict[int, Layer], shapes: Shapes) -> Pair:
    _check_resizable(layer, "it")
    node, units = layer.nodes[0], layer.shape[0]
    if units < 2:
        raise _NoPairError("it has one unit only")
    slots, between, reshape = list(_own_bias(layer)), [], None
    while True:
        result, reader = _only_reader(graph, node)
        between.append(result)
        consumer = _as_consumer(by_constant, result, reader)
        if consumer is not None:
            break
        if operator(reader) in ("Flatten", "Reshape"):
            if reshape is not None or not _flattens(graph, layer, reader, shapes):
                raise _NoPairError(f"a {reader.op} mixes its units")
            reshape = reader
        else:
            slots.extend(_kept_apart(layer, reader, result, flat=reshape is not None))
        node = reader
    _check_readable(layer, consumer, flat=reshape is not None)
    width = math.prod(consumer.shape[1:])
    if width % units or (reshape is None and consumer.shape[1] != units):
        raise _NoPairError(f"{consumer.name} does not read its units one by one")
    counted = reshape if reshape is not None and operator(reshape) == "Reshape" else None
    return Pair(
        layer=layer,
        consumer=consumer,
        units=units,
        block=width // units,
        slots=tuple(slots),
        between=tuple(between),
        reshape=counted,
    )


def _check_resizable(layer: Layer, who: str) -> None:
    """Raise for a weight whose outputs, or whose inputs, are not units of its own."""
    reasons = {
        f"{who} is a {layer.op}": layer.op not in FACTORIZABLE_OPS,
        f"{who} is a grouped convolution": layer.groups > 1,
        f"{who} is a stack of matrices": layer.op == "MatMul" and len(layer.shape) > 2,
        f"{who} is multiplied from the left": layer.op == "MatMul" and layer.orientation == "as_is",
        f"several nodes share the weight of {layer.name}": len(layer.nodes) > 1 or layer.is_mixed,
    }
    for reason, holds in reasons.items():
        if holds:
            raise _NoPairError(reason)
    if layer.fixed_form is not None:
        raise _NoPairError(layer.fixed_form)


def _only_reader(graph: Graph, node: gs.Node) -> tuple[gs.Tensor, gs.Node]:
    """Return what a node gives and the one node that reads it."""
    result, *others = node.outputs
    if result.name in graph.output_names or any(each.name in graph.output_names for each in others):
        raise _NoPairError("the model gives its units as an output")
    if result.name in graph.body_names or any(each.outputs or each.name in graph.body_names for each in others):
        raise _NoPairError("more than one node reads its units")
    if len(result.outputs) != 1:
        raise _NoPairError("more than one node reads its units" if result.outputs else "nothing reads its units")
    return result, result.outputs[0]


def _as_consumer(by_constant: dict[int, Layer], result: gs.Tensor, reader: gs.Node) -> Layer | None:
    """Return the layer that a node is, where it multiplies the units by a weight."""
    if operator(reader) not in FACTORIZABLE_OPS or not any(reader.inputs[place] is result for place in (0, 1)):
        return None
    known = (by_constant.get(id(tensor)) for tensor in reader.inputs[:2])
    return next((layer for layer in known if layer is not None), None)


def _check_readable(layer: Layer, consumer: Layer, *, flat: bool) -> None:
    _check_resizable(consumer, f"{consumer.name}, which reads its units,")
    crosses = (layer.op == "Conv") != (consumer.op == "Conv")
    if crosses != flat or consumer.nodes[0].attrs.get("transA", 0):
        raise _NoPairError(f"{consumer.name} reads them along another axis")


def _own_bias(layer: Layer) -> Iterator[Slot]:
    """Yield what a Conv or Gemm adds, where it has one value per unit."""
    node = layer.nodes[0]
    if layer.op in ("Conv", "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
        yield from _slots(node, 2, layer.shape[0], from_end=1)


def _slots(node: gs.Node, position: int, units: int, *, from_end: int) -> Iterator[Slot]:
    """Yield the place of a constant that is broadcast to the units, ``from_end`` axes before the last, if it has any."""
    constant = node.inputs[position]
    if not is_weight_constant(constant):
        raise _NoPairError(f"a {node.op} joins its units with something else")
    axis = len(constant.shape) - from_end
    size = constant.shape[axis] if axis >= 0 else 1
    if size not in (1, units):
        raise _NoPairError(f"a {node.op} mixes its units")
    if size == units:
        yield Slot(node, position, axis)


def _kept_apart(layer: Layer, node: gs.Node, result: gs.Tensor, *, flat: bool) -> Iterator[Slot]:
    """Yield the constants of a node that go with the units; raise where it does not keep the units apart."""
    op, from_end = operator(node), len(layer.shape) - 1 if layer.op == "Conv" else 1
    if op in _ELEMENTWISE and node.inputs[0] is result:
        return
    if op in _POOLING and layer.op == "Conv" and not flat:
        return
    if op == "BatchNormalization" and layer.op != "MatMul" and not flat:
        for position in range(1, 5):
            yield from _slots(node, position, layer.shape[0], from_end=1)
    elif op in _WITH_CONSTANT and len(node.inputs) == 2 and not flat and not (op == "PRelu" and node.inputs[1] is result):
        yield from _slots(node, 1 if node.inputs[0] is result else 0, layer.shape[0], from_end=from_end)
    elif op in FACTORIZABLE_OPS or op == "ConvTranspose":
        raise _NoPairError(f"a {op} with no weight to fit again reads its units")
    else:
        raise _NoPairError(f"a {node.op} between it and the next layer may mix its units")


def _flattens(graph: Graph, layer: Layer, node: gs.Node, shapes: Shapes) -> bool:
    """Tell whether a node lays the channels of each picture one behind the other, and does nothing else."""
    if layer.op != "Conv":
        return False
    if operator(node) == "Flatten":
        return int(node.attrs.get("axis", 1)) == 1
    if len(node.inputs) < 2 or not is_weight_constant(node.inputs[1]) or node.attrs.get("allowzero", 0):
        return False
    asked = [int(size) for size in values_of(graph, node.inputs[1]).reshape(-1)]
    if len(asked) != 2:
        return False
    before = shapes.get(node.inputs[0].name) or (None,)
    whole = None if None in before[1:] else math.prod(size for size in before[1:] if size is not None)
    rows_stay = asked[0] == 0 or asked[0] == before[0] or (asked[0] == -1 and asked[1] == whole)
    return rows_stay and asked[1] in (-1, whole)


Reasons = Callable[[str], None]
