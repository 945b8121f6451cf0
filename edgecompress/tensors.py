"""The tensors inside ONNX messages: where their payloads lie, how many bytes they have, what they hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgecompress.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Array = NDArray[Any]

SMALL_TENSOR_BYTES = 1024
"""Tensors up to this size stay in the message: shapes and axes, which shape inference needs to see."""

_SUBBYTE_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_DAMAGED = "the model is damaged; export it again"


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that are direct attributes of a node (bodies of If, Loop, Scan)."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a model: initializers and attributes, dense and sparse, nested graphs and functions too."""
    yield from _graph_tensors(proto.graph)
    for training in proto.training_info:
        yield from _graph_tensors(training.initialization)
        yield from _graph_tensors(training.algorithm)
    for function in proto.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            for entry in (*sparse, *attribute.sparse_tensors):
                yield from (entry.values, entry.indices)
        for nested in nested_graphs(node):
            yield from _graph_tensors(nested)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Tell whether the payload of a tensor lies in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def is_small(tensor: onnx.TensorProto) -> bool:
    """Tell whether the payload of a tensor is in the message and has at most ``SMALL_TENSOR_BYTES``."""
    return not is_external(tensor) and tensor_bytes(tensor) <= SMALL_TENSOR_BYTES


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's payload when stored raw. Raises ``ModelError`` for an unknown type or shape."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    if min(tensor.dims, default=0) < 0:
        raise ModelError(f"tensor {tensor.name!r} has the shape {list(tensor.dims)}", hint=_DAMAGED)
    bits = _SUBBYTE_BITS.get(type_name(tensor.data_type)) or 8 * dtype_of(tensor.data_type, tensor.name).itemsize
    return int(math.prod(tensor.dims) * bits + 7) // 8


def type_name(data_type: int) -> str:
    """Return the name of an ONNX data type, such as ``FLOAT``."""
    known = onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(data_type)) if data_type in known else f"type {data_type}"


def dtype_of(data_type: int, name: str) -> np.dtype[Any]:
    """Return the numpy type of an ONNX data type. Raises ``ModelError`` naming ``name`` where there is none."""
    try:
        found: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, ValueError, TypeError) as error:
        raise ModelError(f"tensor {name!r} has the unknown type {type_name(data_type)}", hint=_DAMAGED) from error
    return found


def external_range(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """Return ``(file, offset, length)`` of an external payload. Raises ``ModelError`` unless it lies in ``folder``."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    what = f"tensor {tensor.name!r}: external data"
    try:
        inside = not Path(location).is_absolute() and path.resolve().is_relative_to(folder.resolve())
        size = path.stat().st_size if inside and path.is_file() else None
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a NUL, or a loop of links
        raise ModelError(f"{what} {location[:80]!r} is no file name", hint=_DAMAGED) from error
    if not inside:
        raise ModelError(
            f"{what} {location!r} leaves the model's folder",
            hint="move the data beside the model and save the model again",
        )
    if size is None:
        raise ModelError(f"{what} file {path} is missing", hint="copy the data file beside the model")
    needed = tensor_bytes(tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", needed))
    except ValueError as error:
        raise ModelError(f"{what} has a malformed range", hint=_DAMAGED) from error
    if offset < 0 or length != needed or offset + length > size:
        raise ModelError(
            f"{what} file {path} is too short or its length does not fit the shape",
            hint="the data file is truncated or belongs to another model; copy it again",
        )
    return path, offset, length


def tensor_values(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Return a tensor's values; an external payload is mapped, not read. Raises ``ModelError`` for a malformed one."""
    if is_external(tensor):
        path, offset, length = external_range(tensor, folder)
        if not length:
            return np.empty(tuple(tensor.dims), dtype_of(tensor.data_type, tensor.name))
        if type_name(tensor.data_type) not in _SUBBYTE_BITS:
            dtype = dtype_of(tensor.data_type, tensor.name)
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))
        tensor = inlined_tensor(tensor, folder)
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r} is malformed: {error}", hint=_DAMAGED) from error


def inlined_tensor(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """Return a copy of a tensor with an external payload that holds the payload itself."""
    path, offset, length = external_range(tensor, folder)
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.ClearField("external_data")
    copy.ClearField("data_location")
    with path.open("rb") as stream:
        stream.seek(offset)
        copy.raw_data = stream.read(length)
    return copy


def without_payloads(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy whose initializers keep their values only where they are small; nothing large is ever copied."""
    light = onnx.ModelProto()
    copy_fields(proto, light, leave_out=("graph",))
    copy_fields(proto.graph, light.graph, leave_out=("initializer",))
    for tensor in proto.graph.initializer:
        if is_small(tensor):
            light.graph.initializer.append(tensor)
        else:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return light


def copy_fields(source: Any, destination: Any, *, leave_out: tuple[str, ...]) -> None:
    """Copy the fields of a protobuf message into an empty one of the same kind."""
    for field, value in source.ListFields():
        if field.name in leave_out:
            continue
        if hasattr(value, "extend"):
            getattr(destination, field.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(destination, field.name).CopyFrom(value)
        else:
            setattr(destination, field.name, value)
