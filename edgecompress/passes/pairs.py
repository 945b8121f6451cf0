"""Find the layers whose units can be removed: those that just one other layer reads, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgecompress.graph import Graph, is_weight_constant, operator, values_of
from edgecompress.model import infer_shapes
from edgecompress.operands import FACTORIZABLE_OPS

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer
    from edgecompress.macs import Shapes

_ELEMENTWISE = frozenset(
    (
        *("Abs", "Clip", "Dropout", "Erf", "Exp", "Identity", "Neg", "Sqrt"),
        *("Celu", "Elu", "Gelu", "LeakyRelu", "Mish", "Relu", "Selu", "ThresholdedRelu"),
        *("HardSigmoid", "HardSwish", "Sigmoid", "Softplus", "Softsign", "Tanh"),
    )
)
_WITH_CONSTANT = frozenset(("Add", "Sub", "Mul", "Div", "PRelu"))
_POOLING = frozenset(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"))


@dataclass(frozen=True)
class Slot:
    """An input of a node that holds a constant with one slice per unit along ``axis``."""

    node: gs.Node
    position: int
    axis: int


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
    why = _why_fixed(layer) or ("has one unit only" if layer.shape[0] == 1 else None)
    if why is not None:
        raise _NoPairError(f"it {why}")
    slots, between, reshape = list(_own_bias(layer)), [], None
    result, reader = _only_reader(graph, layer.nodes[0])
    while (consumer := _as_consumer(by_constant, result, reader)) is None:
        between.append(result)
        if operator(reader) in ("Flatten", "Reshape"):
            if reshape is not None or not _flattens(graph, layer, reader, shapes):
                raise _NoPairError(f"a {reader.op} lays its units out in another way")
            reshape = reader
        else:
            slots.extend(_kept_apart(layer, reader, result, flat=reshape is not None))
        result, reader = _only_reader(graph, reader)
    width = _width(layer, consumer, flat=reshape is not None)
    return Pair(
        layer=layer,
        consumer=consumer,
        units=layer.shape[0],
        block=width // layer.shape[0],
        slots=tuple(slots),
        between=(*between, result),
        reshape=reshape if reshape is not None and operator(reshape) == "Reshape" else None,
    )


def _why_fixed(layer: Layer) -> str | None:
    """Say why neither the outputs nor the inputs of a layer can be taken away one by one."""
    reasons = {
        f"is a {layer.op}": layer.op not in FACTORIZABLE_OPS,
        "is a grouped convolution": layer.groups > 1,
        "is a stack of matrices": layer.op == "MatMul" and len(layer.shape) > 2,
        "has its weight on the left": layer.op == "MatMul" and layer.orientation == "as_is",
        "has a weight that several nodes share": len(layer.nodes) > 1,
        "has a weight that something else uses, too": layer.fixed_form is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _only_reader(graph: Graph, node: gs.Node) -> tuple[gs.Tensor, gs.Node]:
    """Return what a node gives and the one node that reads it."""
    if any(each.name in graph.output_names for each in node.outputs):
        raise _NoPairError("the model gives its units as an output")
    result, *others = node.outputs
    is_read = any(each.outputs for each in others) or any(each.name in graph.body_names for each in node.outputs)
    if is_read or len(result.outputs) != 1:
        raise _NoPairError("its units are not read just once")
    return result, result.outputs[0]


def _as_consumer(by_constant: dict[int, Layer], result: gs.Tensor, reader: gs.Node) -> Layer | None:
    """Return the layer that a node is, where it multiplies the units by a weight."""
    if operator(reader) not in FACTORIZABLE_OPS or not any(tensor is result for tensor in reader.inputs[:2]):
        return None
    known = (by_constant.get(id(tensor)) for tensor in reader.inputs[:2])
    return next((layer for layer in known if layer is not None), None)


def _width(layer: Layer, consumer: Layer, *, flat: bool) -> int:
    """Return how many inputs a consumer has; raise where they are not the units, one behind the other."""
    why = _why_fixed(consumer)
    if why is not None:
        raise _NoPairError(f"{consumer.name}, which reads its units, {why}")
    crosses = (layer.op == "Conv") != (consumer.op == "Conv")
    if crosses != flat or consumer.nodes[0].attrs.get("transA", 0):
        raise _NoPairError(f"{consumer.name} reads it along another axis")
    return math.prod(consumer.shape[1:])


def _own_bias(layer: Layer) -> Iterator[Slot]:
    """Yield what a Conv or Gemm adds, where it has one value per unit."""
    node = layer.nodes[0]
    if layer.op in ("Conv", "Gemm") and len(node.inputs) > 2 and node.inputs[2].name:
        yield from _slots(layer, node, 2, from_end=1)


def _kept_apart(layer: Layer, node: gs.Node, result: gs.Tensor, *, flat: bool) -> Iterator[Slot]:
    """Yield the constants of a node that go with the units; raise where it does not keep the units apart."""
    op, first = operator(node), node.inputs[0] is result
    if first and (op in _ELEMENTWISE or (op in _POOLING and layer.op == "Conv")):
        return
    if op == "BatchNormalization" and layer.op != "MatMul" and not flat and not node.attrs.get("training_mode", 0):
        for position in range(1, 5):
            yield from _slots(layer, node, position, from_end=1)
    elif op in _WITH_CONSTANT and not flat and (first or op != "PRelu"):
        yield from _slots(layer, node, 1 if first else 0, from_end=len(layer.shape) - 1)
    else:
        raise _NoPairError(f"a {node.op} reads its units, which may mix them")


def _slots(layer: Layer, node: gs.Node, position: int, *, from_end: int) -> Iterator[Slot]:
    """Yield the place of a constant that is broadcast to the units along its axis ``-from_end``, if it is that long."""
    constant = node.inputs[position]
    if not is_weight_constant(constant):
        raise _NoPairError(f"a {node.op} joins its units with something else")
    axis = len(constant.shape) - from_end
    size = constant.shape[axis] if axis >= 0 else 1
    if size not in (1, layer.shape[0]) or len(constant.shape) > len(layer.shape):
        raise _NoPairError(f"a {node.op} reads its units, which may mix them")
    if size > 1:
        yield Slot(node, position, axis)


def _flattens(graph: Graph, layer: Layer, node: gs.Node, shapes: Shapes) -> bool:
    """Tell whether a node lays the channels of each picture one behind the other, and does nothing else."""
    if layer.op != "Conv":
        return False
    if operator(node) == "Flatten":
        return int(node.attrs.get("axis", 1)) == 1
    asked = reshaped_to(graph, node)
    if asked is None or node.attrs.get("allowzero", 0):
        return False
    before = shapes.get(node.inputs[0].name) or (None,)
    sizes = [size for size in before[1:] if size is not None]
    whole = math.prod(sizes) if sizes and len(sizes) == len(before) - 1 else None
    rows_stay = asked[0] in (0, before[0]) or (asked[0] == -1 and asked[1] == whole)
    return rows_stay and asked[1] in (-1, whole)


def reshaped_to(graph: Graph, node: gs.Node) -> tuple[int, int] | None:
    """Return the two sizes that a Reshape asks for, ``None`` where they are not constant or not two."""
    if len(node.inputs) < 2 or not is_weight_constant(node.inputs[1]) or tuple(node.inputs[1].shape) != (2,):
        return None
    rows, columns = values_of(graph, node.inputs[1])
    return int(rows), int(columns)
