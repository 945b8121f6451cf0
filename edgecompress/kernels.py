"""The kernels that the runtime makes of a model, each as a small model of its own that can be timed alone."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from edgecompress.errors import ModelError
from edgecompress.model import load_model, payload_bytes
from edgecompress.runtime.session import import_runtime, runtime_error
from edgecompress.save import inlined

Array = npt.NDArray[Any]

_SILENT = 4
# So many copies of a kernel that the call itself weighs little; fewer of a large one, which also takes longer.
_COPIES, _COPIES_BYTES = 16, 8_000_000
_LARGEST_BYTES = 1_500_000_000  # the optimized model is one message of protocol buffers, which hold less than 2 GB
_SMALL = 64  # integers of a constant up to this size are part of what a kernel does: axes, pads, shapes


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One node of an optimized graph: the work that a cost belongs to.

    ``signature`` identifies that work: operator, attributes, types and shapes; weights do not matter. ``shapes`` are
    those of the tensors that come in, constants included, and go out. ``count`` is how often the model has it.
    """

    op: str
    types: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    signature: str
    count: int


@dataclass(frozen=True)
class Probe:
    """A model that runs ``copies`` of a kernel, and inputs for it; with 0 copies it shows what a call costs."""

    proto: onnx.ModelProto
    feeds: Mapping[str, Array]
    copies: int


def find_kernels(
    path: Path, feeds: Mapping[str, Array], *, for_this_machine: bool
) -> tuple[list[tuple[Kernel, Probe]], tuple[str, ...]]:
    """Return each distinct kernel that the runtime runs for the ONNX file at ``path``, with a probe to time it.

    The graph is taken as the runtime has optimized it: ``for_this_machine`` with the memory layouts of this processor,
    otherwise as far as it is the same on every one. The operators of nodes that contain graphs (If, Loop, Scan) or pass
    on sequences are returned beside, without probes. Raises ``ModelError`` for what the runtime refuses.
    """
    with tempfile.TemporaryDirectory() as name:
        proto = _optimized(path, Path(name) / "optimized.onnx", for_this_machine=for_this_machine)
    values = _values(proto, feeds)
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    alone = [_can_be_alone(node, values) for node in proto.graph.node]
    nodes = [node for node, fits in zip(proto.graph.node, alone, strict=True) if fits]
    left_out = tuple(sorted({node.op_type for node, fits in zip(proto.graph.node, alone, strict=True) if not fits}))
    signatures = [_signature(node, values, constants) for node in nodes]
    counts = Counter(signatures)
    first = {signature: node for node, signature in reversed(list(zip(nodes, signatures, strict=True)))}
    kernels = [
        (_kernel(first[signature], values, constants, signature, count), _probe(proto, first[signature], values))
        for signature, count in counts.items()
    ]
    return kernels, left_out


def _can_be_alone(node: onnx.NodeProto, values: Mapping[str, Any]) -> bool:
    """Tell whether a node can be taken out of its graph: it holds none itself, and passes on nothing but tensors."""
    passed = [values[name] for name in (*node.input, *node.output) if name in values]
    holds_graph = any(attribute.HasField("g") for attribute in node.attribute)
    return not holds_graph and all(isinstance(value, np.ndarray) for value in passed)


def empty_probe(inputs: int) -> Probe:
    """Return a probe with no kernel at all but ``inputs`` inputs, which shows what a call costs."""
    small = np.zeros(1, dtype=np.float32)
    feeds = {f"input_{index}": small for index in range(inputs)}
    node = onnx.helper.make_node("Identity", ["input_0"], ["out"])
    return Probe(_model([node], feeds, {"out": small}, [], [onnx.helper.make_opsetid("", 17)]), feeds, 0)


def _optimized(path: Path, destination: Path, *, for_this_machine: bool) -> onnx.ModelProto:
    """Return the model as the runtime runs it, with its external data in it."""
    model = load_model(path)
    if payload_bytes(model) > _LARGEST_BYTES:
        raise ModelError(f"{path}: too large to be taken apart", hint="profile a smaller model with the same layers")
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if for_this_machine else levels.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(destination)
    try:
        runtime.InferenceSession(inlined(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(destination)
    except Exception as error:  # the runtime's errors have no common base
        raise runtime_error(error, str(path)) from None


def _values(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return every tensor of the optimized graph by name, from one run."""
    runtime = import_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    known = {value.name for value in exposed.graph.output}
    inner = [name for node in proto.graph.node for name in node.output if name and name not in known]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    try:
        session = runtime.InferenceSession(exposed.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        outputs = session.run(names, dict(feeds))
    except Exception as error:
        raise runtime_error(error, "the optimized model") from None
    return {**dict(zip(names, outputs, strict=True)), **feeds}


def _signature(node: onnx.NodeProto, values: Mapping[str, Array], constants: Mapping[str, onnx.TensorProto]) -> str:
    """Return what identifies the work of a node, as a digest."""
    attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
    tensors = [_tensor_signature(name, values, constants) for name in node.input]
    outputs = [None if not name else _describe(values[name]) for name in node.output]
    text = json.dumps([node.domain, node.op_type, attributes, tensors, outputs])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _tensor_signature(
    name: str, values: Mapping[str, Array], constants: Mapping[str, onnx.TensorProto]
) -> list[Any] | None:
    if not name:
        return None
    if name not in constants:
        return _describe(values[name])
    tensor = constants[name]
    value = onnx.numpy_helper.to_array(tensor) if np.prod(tensor.dims) <= _SMALL else None
    content = value.tolist() if value is not None and value.dtype == np.int64 else None
    return ["constant", tensor.data_type, list(tensor.dims), content]


def _describe(value: Array) -> list[Any]:
    return [str(value.dtype), list(value.shape)]


def _kernel(
    node: onnx.NodeProto,
    values: Mapping[str, Array],
    constants: Mapping[str, onnx.TensorProto],
    signature: str,
    count: int,
) -> Kernel:
    names = [name for name in (*node.input, *node.output) if name]
    shapes = [tuple(constants[name].dims) if name in constants else values[name].shape for name in names]
    types = [str(values[name].dtype) for name in (*node.input, *node.output) if name in values]
    domain = f"{node.domain}:" if node.domain not in ("", "ai.onnx") else ""
    return Kernel(
        op=f"{domain}{node.op_type}",
        types=tuple(dict.fromkeys(types)),
        shapes=tuple(shapes),
        signature=signature,
        count=count,
    )


def _probe(proto: onnx.ModelProto, node: onnx.NodeProto, values: Mapping[str, Array]) -> Probe:
    """Return a model with copies of a node; each has inputs and weights of its own, so that none can be merged.

    In the model, too, a kernel finds other weights than the last one in the processor's caches.
    """
    constants = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in set(node.input)}
    size = sum(tensor.ByteSize() for tensor in constants.values())
    size += sum(values[name].nbytes for name in node.input if name in values)
    copies = max(1, min(_COPIES, _COPIES_BYTES // max(size, 1)))
    nodes, tensors, feeds, outputs = [], [], {}, {}
    for copy in range(copies):
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = f"kernel_{copy}"
        for index, name in enumerate(node.input):
            twin.input[index] = _own(name, copy)
            if name in constants:
                tensor = onnx.TensorProto()
                tensor.CopyFrom(constants[name])
                tensor.name = _own(name, copy)
                tensors.append(tensor)
            elif name:
                feeds[_own(name, copy)] = values[name]
        for index, name in enumerate(node.output):
            twin.output[index] = _own(name, copy)
            if name:
                outputs[_own(name, copy)] = values[name]
        nodes.append(twin)
    unique = {tensor.name: tensor for tensor in tensors}
    return Probe(_model(nodes, feeds, outputs, list(unique.values()), proto.opset_import), feeds, copies)


def _own(name: str, copy: int) -> str:
    return f"{name}/{copy}" if name else ""


def _model(
    nodes: Sequence[onnx.NodeProto],
    feeds: Mapping[str, Array],
    outputs: Mapping[str, Array],
    tensors: Sequence[onnx.TensorProto],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(list(nodes), "kernel", list(_infos(feeds)), list(_infos(outputs)), list(tensors))
    model = onnx.helper.make_model(graph, opset_imports=list(opsets), producer_name="edgecompress")
    model.ir_version = min(model.ir_version, 10)
    return model


def _infos(values: Mapping[str, Array]) -> Iterator[onnx.ValueInfoProto]:
    for name, value in values.items():
        kind = (
            onnx.TensorProto.STRING if value.dtype.kind in "OUS" else onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        )
        yield onnx.helper.make_tensor_value_info(name, kind, value.shape)
