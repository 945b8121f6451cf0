"""Run passes one after the other and check each: a pass that breaks a graph is named, and nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx

from edgecompress.errors import EdgecompressError, ModelError, PassError
from edgecompress.graph import Graph, close_graph, open_graph
from edgecompress.inference import run_once
from edgecompress.model import Array, Model, payload_bytes, signature
from edgecompress.tensors import all_tensors, is_external, is_small, without_payloads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

CHECK_LIMIT_BYTES = 256 << 20
"""Models with more weight bytes are not run twice after every pass; validation still compares them."""

_MIN_SQNR_DB = {2: 25.0, 4: 60.0, 8: 60.0}
"""What a correct rewrite keeps, by the bytes of the output's type: rounding, with a wide margin for deep graphs."""

_ROUNDING = 1e-6
"""The root mean square error that is always allowed: an output that is zero but for rounding has no signal."""


@dataclass(frozen=True)
class Change:
    """What a pass did to one weight.

    ``dense`` gives the weight that the new form stands for, shaped as it was stored; ``tensors`` names the constants
    that take the weight's place, in the order in which they are applied.
    """

    layer: str
    action: str
    dense: Callable[[], Array] | None = None
    tensors: tuple[str, ...] = ()


class Pass(Protocol):
    """A rewrite: edits the graph in place and says what it did."""

    def __call__(self, graph: Graph) -> Sequence[Change]:
        """Edit ``graph`` and return the changes."""


def is_valid(model: Model) -> bool:
    """Tell whether the ONNX checker accepts a model. Payloads are not looked at where they would not fit a message."""
    try:
        heavy = payload_bytes(model) > CHECK_LIMIT_BYTES or any(map(is_external, all_tensors(model.proto)))
        onnx.checker.check_model(_for_checker(model.proto) if heavy else model.proto)
    except Exception:  # the checker raises several classes, among them ones of its C++ core
        return False
    return True


def run_pass(
    model: Model, name: str, rewrite: Pass, feeds: Mapping[str, Array] | None
) -> tuple[Model, Sequence[Change]]:
    """Run one pass on a private copy of the model's graph and return the new model.

    Checked afterwards: the ONNX checker (where it accepted the model before), inputs and outputs unchanged, and, with
    ``feeds``, that the new model computes what the old one does with every changed weight in its ``dense`` form. A pass
    that rounds activations to integers is compared without the rounding; with it, the model only has to run.

    Raises:
        PassError: a check failed. This is a defect of the pass, not of the model.
    """
    graph = open_graph(model)
    try:
        changes = rewrite(graph)
        if not changes:
            return model, changes
        result = close_graph(graph)
    except EdgecompressError:
        raise
    except Exception as error:
        if not is_valid(model):  # it was malformed before: not the pass's fault
            raise ModelError(
                f"{model.path}: the graph is malformed: {type(error).__name__}: {error}",
                hint="the ONNX checker refuses this model; export it again",
            ) from error
        raise _defect(name, f"{type(error).__name__}: {error}") from error
    if is_valid(model) and not is_valid(result):
        raise _defect(name, "the ONNX checker refuses the graph it made")
    if signature(model.proto) != signature(result.proto):
        raise _defect(name, "the inputs or outputs of the model changed")
    if feeds is not None and payload_bytes(model) <= CHECK_LIMIT_BYTES:
        _check_numerics(name, _with_dense(model, changes), result, feeds)
    return result, changes


def _defect(name: str, what: str) -> PassError:
    return PassError(
        f"pass {name!r} failed: {what}",
        hint="this is a defect of edgecompress: please report it with the model; other options may avoid the pass",
    )


def _with_dense(model: Model, changes: Sequence[Change]) -> Model:
    """Return the model with every changed weight replaced by the dense form of what replaced it."""
    dense = {change.layer: change.dense for change in changes if change.dense is not None}
    if not dense:
        return model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in dense:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            values = np.ascontiguousarray(dense[tensor.name]()).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return Model(model.path, proto)


def _check_numerics(name: str, expected: Model, result: Model, feeds: Mapping[str, Array]) -> None:
    before = run_once(expected, feeds)
    exact = _without_rounding(expected, result)
    try:
        after = run_once(exact, feeds, in_floats=exact is not result)
        if exact is not result:
            run_once(result, feeds)
    except EdgecompressError as error:
        raise _defect(name, f"the runtime refuses the graph it made: {error.message}") from error
    for output, reference in before.items():
        found = after[output]
        if found.shape != reference.shape or found.dtype != reference.dtype:
            was, now = (f"{each.dtype} {each.shape}" for each in (reference, found))
            raise _defect(name, f"output {output!r} is {now}, not {was}")
        if not np.issubdtype(reference.dtype, np.floating) or not np.isfinite(reference).all():
            continue  # integers (an argmax) may flip on rounding; a model that overflows on noise cannot be compared
        signal = float(np.sum(reference.astype(np.float64) ** 2))
        error_energy = float(np.sum((reference.astype(np.float64) - found.astype(np.float64)) ** 2))
        allowed = signal * 10.0 ** (-_MIN_SQNR_DB[reference.dtype.itemsize] / 10.0) + reference.size * _ROUNDING**2
        if not error_energy <= allowed:
            what = f"differs from what the new weights stand for (error {error_energy:.3g} of {signal:.3g})"
            raise _defect(name, f"output {output!r} {what}")


def _without_rounding(before: Model, after: Model) -> Model:
    """Return ``after`` without the pairs of QuantizeLinear and DequantizeLinear that ``before`` does not have."""
    known = {name for node in before.proto.graph.node for name in node.output}
    sources = {
        node.output[0]: node.input[0]
        for node in after.proto.graph.node
        if node.op_type == "QuantizeLinear" and node.output[0] not in known
    }
    if not sources:
        return after
    proto = onnx.ModelProto()
    proto.CopyFrom(after.proto)
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in sources:
            node.CopyFrom(onnx.helper.make_node("Identity", [sources[node.input[0]]], list(node.output)))
    return Model(after.path, proto)


def _for_checker(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which all but small initializers are inputs of the same type and shape."""
    light = without_payloads(proto)
    present = {value.name for value in light.graph.input}
    del light.graph.initializer[:]
    for tensor in proto.graph.initializer:
        if is_small(tensor):
            light.graph.initializer.append(tensor)
        elif tensor.name not in present:
            spec = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            light.graph.input.append(spec)
    return light
