"""Make the channels that int8 convolutions pass to each other as many as their kernels take at once: zeros fill up.

The integer kernels of onnxruntime 1.31 gather the inputs of a position channel by channel and give outputs 16 at a
time; what is left over is done in single steps. 12 outputs take twice the time of 16, an image of 3 channels twice the
time of 4, and 19 outputs more than 32. Channels of zeros cost next to nothing in a container, and no result changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_graphsurgeon as gs

from edgecompress.graph import Graph, fresh_name, is_weight_constant, operator, replace_nodes, values_of
from edgecompress.passes.run import Change

if TYPE_CHECKING:
    from edgecompress.model import Array

_OUTPUTS, _MORE_OUTPUTS = 16, 8  # a kernel's step, and the step beyond the first
_INPUTS = 4


def align(graph: Graph) -> Sequence[Change]:
    """Fill channels up with zeros in a graph that ``quantize`` has written; what it computes stays the same.

    - A Pad with zeros between two int8 nodes works on the codes: the runtime would go back to floats for it.
    - Channels that go from one int8 convolution to others alone, or through depthwise ones, become a multiple of 8, at
      least 16.
    - An int8 convolution of fewer than 4 channels, those of an image, reads 4.
    """
    changes: list[Change] = []
    for rewrite in (_pad_codes, _widen, _widen_image):
        for node in list(graph.surgeon.nodes):
            changed = rewrite(graph, node) if node.outputs else None  # a node without outputs was replaced
            changes += [] if changed is None else [Change(changed, "aligned")]
    return changes


def _pad_codes(graph: Graph, node: gs.Node) -> str | None:
    """Pad codes instead of floats: ``Dequantize, Pad, Quantize`` with one step becomes a Pad of integers.

    Like the others, return what was changed, if anything was.
    """
    if operator(node) != "Pad" or len(node.inputs) < 2 or node.attrs.get("mode", "constant") != "constant":
        return None
    before, after = _producer(node.inputs[0]), _only_reader(graph, node.outputs[0])
    is_zero = len(node.inputs) < 3 or not node.inputs[2].name or _is_zero(graph, node.inputs[2])
    if not _is_rebuilt(node.inputs[0]) or _op(after) != "QuantizeLinear" or not is_zero:
        return None
    if [each.name for each in before.inputs[1:]] != [each.name for each in after.inputs[1:]]:
        return None
    codes = after.outputs[0]
    inputs = [before.inputs[0], node.inputs[1], before.inputs[2], *node.inputs[3:]]
    for each in (node, after):
        each.outputs.clear()
        each.inputs.clear()
    replace_nodes(graph, {id(node): [gs.Node("Pad", inputs=inputs, outputs=[codes])], id(after): []})
    _drop_unread(graph, before)
    return str(codes.name)


@dataclass(frozen=True)
class _Path:
    """An int8 convolution, the depthwise ones that its outputs pass, and those in which they end."""

    first: gs.Node
    depthwise: tuple[gs.Node, ...]
    last: tuple[gs.Node, ...]


def _path(graph: Graph, node: gs.Node) -> _Path | None:
    """Return the way of the outputs of an int8 convolution, ``None`` where they cannot become more."""
    if not _is_int8(graph, node) or node.attrs.get("group", 1) != 1:
        return None
    depthwise: list[gs.Node] = []
    last: list[gs.Node] = []
    for each in chain([node], depthwise):  # the second list grows while it is gone through
        readers = _readers(graph, each)
        if not readers or not all(_is_int8(graph, reader) for reader in readers):
            return None
        for reader in readers:
            groups, weight = reader.attrs.get("group", 1), _decoder(graph, reader.inputs[1]).inputs[0]
            if groups == 1:
                last.append(reader)
            elif groups == weight.shape[0] and weight.shape[1] == 1:
                depthwise.append(reader)
            else:
                return None
    return _Path(node, tuple(depthwise), tuple(last))


def _widen(graph: Graph, node: gs.Node) -> str | None:
    """Fill up the outputs of a convolution."""
    path = _path(graph, node)
    if path is None:
        return None
    channels = _decoder(graph, path.first.inputs[1]).inputs[0].shape[0]
    more = max(_OUTPUTS, -(-channels // _MORE_OUTPUTS) * _MORE_OUTPUTS) - channels
    if not more:
        return None
    for each in (path.first, *path.depthwise):
        _forget_shapes(graph, each)
        for tensor in each.inputs[1:]:
            if is_weight_constant(tensor):
                _pad_constant(graph, tensor, 0, more, mode="constant")
            else:
                _pad_decoder(graph, _decoder(graph, tensor), 0, more)
    for each in path.last:
        _pad_decoder(graph, _decoder(graph, each.inputs[1]), 1, more)
    for each in path.depthwise:
        wider = gs.Node("Conv", each.name, {**each.attrs, "group": channels + more}, list(each.inputs))
        outputs = list(each.outputs)
        each.outputs.clear()
        each.inputs.clear()
        wider.outputs.extend(outputs)
        replace_nodes(graph, {id(each): [wider]})
    return str(path.first.inputs[1].name)


def _widen_image(graph: Graph, node: gs.Node) -> str | None:
    """Let a convolution of a few channels read as many as are gathered at once."""
    if not _is_int8(graph, node) or node.attrs.get("group", 1) != 1:
        return None
    weight = _decoder(graph, node.inputs[1])
    rank, more = len(weight.inputs[0].shape), _INPUTS - weight.inputs[0].shape[1]
    if more <= 0:
        return None
    before = node.inputs[0].inputs[0]
    codes, scale, zero_point = before.inputs
    name = codes.name
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + 1] = more
    wide = gs.Variable(fresh_name(graph, f"{name}.wide"), dtype=np.uint8)
    floats = gs.Variable(fresh_name(graph, f"{name}.wide.rounded"), dtype=np.float32)
    amounts = gs.Constant(fresh_name(graph, f"{name}.pads"), pads)
    added = [
        gs.Node("Pad", inputs=[codes, amounts, zero_point], outputs=[wide]),
        gs.Node("DequantizeLinear", inputs=[wide, scale, zero_point], outputs=[floats]),
    ]
    _pad_decoder(graph, weight, 1, more)
    node.inputs[0] = floats
    replace_nodes(graph, {id(node): [*added, node]})
    _drop_unread(graph, before)
    return str(node.inputs[1].name)


def _is_int8(graph: Graph, node: gs.Node) -> bool:
    """Tell whether a node is a convolution of codes by codes, which no other node uses."""
    if operator(node) != "Conv" or not _is_rebuilt(node.inputs[0]):
        return False
    return _decoder(graph, node.inputs[1]) is not None and all(_is_own(graph, bias) for bias in node.inputs[2:])


def _is_own(graph: Graph, bias: Any) -> bool:
    """Tell whether a bias is of this node alone; it may be floats."""
    is_free = len(bias.outputs) == 1 and bias.name not in graph.output_names | graph.body_names
    return (is_free and is_weight_constant(bias)) or _decoder(graph, bias) is not None


def _is_rebuilt(tensor: Any) -> bool:
    node = _producer(tensor)
    return _op(node) == "DequantizeLinear" and len(node.inputs) == 3


def _decoder(graph: Graph, tensor: Any) -> Any:
    """Return the node that rebuilds a weight or bias from integers that nothing else uses and of which 0 means 0."""
    node = _producer(tensor)
    if _op(node) != "DequantizeLinear" or len(tensor.outputs) != 1:
        return None
    if tensor.name in graph.output_names | graph.body_names or not all(map(is_weight_constant, node.inputs)):
        return None
    codes, step = node.inputs[:2]
    is_own = len(codes.outputs) == len(step.outputs) == 1 and codes.dtype in (np.int8, np.int32)
    by_output = not step.shape or (len(step.shape) == 1 and node.attrs.get("axis", 1) == 0)
    return node if is_own and by_output and all(_is_zero(graph, each) for each in node.inputs[2:]) else None


def _readers(graph: Graph, node: gs.Node) -> list[gs.Node]:
    """Return what reads the rounded outputs of a node; empty where something reads them before they are rounded."""
    readers = [dequantize.outputs[0].outputs for dequantize in _dequantized(graph, node)]
    return list(chain.from_iterable(readers))


def _dequantized(graph: Graph, node: gs.Node) -> list[gs.Node]:
    follower = _only_reader(graph, node.outputs[0])
    if _op(follower) in ("Relu", "Clip"):
        follower = _only_reader(graph, follower.outputs[0])
    if _op(follower) != "QuantizeLinear":
        return []
    codes = follower.outputs[0]
    hidden = graph.output_names | graph.body_names
    is_free = all(operator(each) == "DequantizeLinear" and each.outputs[0].name not in hidden for each in codes.outputs)
    return list(codes.outputs) if is_free and codes.name not in hidden else []


def _forget_shapes(graph: Graph, node: gs.Node) -> None:
    """Give the float tensors that become wider names of which the file knows no shape."""
    result: Any = node.outputs[0]
    follower: Any = result.outputs[0]
    found = [result] if operator(follower) == "QuantizeLinear" else [result, follower.outputs[0]]
    for tensor in (*found, *(each.outputs[0] for each in _dequantized(graph, node))):
        tensor.name = fresh_name(graph, f"{tensor.name}.wide")


def _pad_decoder(graph: Graph, decoder: gs.Node, axis: int, more: int) -> None:
    """Add ``more`` zeros along an axis of the integers behind a weight or bias; steps are repeated."""
    codes, step = decoder.inputs[:2]
    _pad_constant(graph, codes, axis, more, mode="constant")
    if axis == 0 and len(step.shape):
        _pad_constant(graph, step, 0, more, mode="edge")
        if len(decoder.inputs) > 2:
            values = values_of(graph, decoder.inputs[2])
            zeros = np.zeros(values.shape[0] + more, values.dtype)
            decoder.inputs[2] = gs.Constant(fresh_name(graph, "int8.zeros"), zeros)


def _pad_constant(graph: Graph, constant: gs.Constant, axis: int, more: int, *, mode: Any) -> None:
    values: Array = values_of(graph, constant)
    constant.values = np.pad(values, [(0, more if each == axis else 0) for each in range(values.ndim)], mode=mode)


def _drop_unread(graph: Graph, node: gs.Node) -> None:
    """Remove a node that nothing reads any more: the runtime would compute it all the same."""
    result: Any = node.outputs[0]
    if not result.outputs and result.name not in graph.output_names | graph.body_names:
        node.inputs.clear()
        node.outputs.clear()
        replace_nodes(graph, {id(node): []})


def _op(node: Any) -> str:
    return "" if node is None else operator(node)


def _producer(tensor: Any) -> Any:
    return tensor.inputs[0] if tensor.inputs else None


def _only_reader(graph: Graph, tensor: Any) -> Any:
    if len(tensor.outputs) != 1 or tensor.name in graph.output_names | graph.body_names:
        return None
    return tensor.outputs[0]


def _is_zero(graph: Graph, tensor: Any) -> bool:
    return is_weight_constant(tensor) and not values_of(graph, tensor).any()
