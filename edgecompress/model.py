"""Load and save ONNX models: external data, files above 2 GB, the signature. Weights stay on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgecompress.errors import ModelError

Array = NDArray[Any]

MIN_OPSET = 9
MAX_OPSET = 26
"""The newest opset that the tested runtime (onnxruntime 1.31) loads."""

INLINE_LIMIT_BYTES = 1_800_000_000
"""A protobuf message ends at 2 GiB; models with more weight bytes are saved with an external data file."""

_SMALL_TENSOR_BYTES = 1024
_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model; ``None`` in ``shape`` is a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Model:
    """A model file that was read. Payloads in external files are not in ``proto``: ``tensor_values`` maps them from ``folder``."""

    path: Path
    proto: onnx.ModelProto

    @property
    def folder(self) -> Path:
        """The folder that external data is relative to."""
        return self.path.parent

    @property
    def opset(self) -> int:
        """The version of the standard operator set."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in _STANDARD_DOMAINS), 0)


def load_model(path: Path) -> Model:
    """Read an ONNX file without its external payloads and check that this tool can work on it.

    Raises:
        ModelError: not an ONNX file, truncated, an opset outside ``MIN_OPSET``..``MAX_OPSET``, or external data that is
            missing, too short or outside the model's folder.
    """
    model = Model(path, parse_model(path))
    if not MIN_OPSET <= model.opset <= MAX_OPSET:
        raise ModelError(
            f"{path}: opset {model.opset} is not supported (allowed: {MIN_OPSET} to {MAX_OPSET})",
            hint="convert it with onnx.version_converter, or store it as it is with 'edgecompress pack'",
        )
    for tensor in all_tensors(model.proto):
        if is_external(tensor):
            external_range(tensor, model.folder)
    return model


def parse_model(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; external payloads are not loaded. Raises ``ModelError`` with the reason."""
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"{path}: no such file", hint="check the path") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", hint="check the path") from error
    except Exception as error:  # protobuf's own error class differs between its implementations
        raise ModelError(
            f"{path}: not an ONNX file, or a truncated one", hint="check the file, or export the model again"
        ) from error
    if not proto.ir_version or not (proto.graph.node or proto.graph.output):
        raise ModelError(f"{path}: not an ONNX file (it holds no graph)", hint="check the file, or export it again")
    return proto


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and every graph nested in its nodes' attributes (bodies of If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for nested in nested_graphs(node):
            yield from all_graphs(nested)


def nested_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs that are direct attributes of a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every initializer and every tensor attribute of a model, nested graphs and functions included."""
    for graph in all_graphs(proto.graph):
        yield from graph.initializer
        yield from _attribute_tensors(graph.node)
    for function in proto.functions:
        yield from _attribute_tensors(function.node)


def _attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def is_external(tensor: onnx.TensorProto) -> bool:
    """Tell whether the payload of a tensor lies in another file."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of a tensor's payload when stored raw."""
    bits = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.get(
        onnx.TensorProto.DataType.Name(tensor.data_type)
    )
    count = int(np.prod(tensor.dims, dtype=np.int64))
    if bits is not None:
        return (count * bits + 7) // 8
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def external_range(tensor: onnx.TensorProto, folder: Path) -> tuple[Path, int, int]:
    """Return ``(file, offset, length)`` of an external payload. Raises ``ModelError`` unless it lies in ``folder``."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    inside = location and path.resolve().is_relative_to(folder.resolve())
    if not inside or Path(location).is_absolute():
        raise ModelError(
            f"tensor {tensor.name!r}: external data {location!r} leaves the model's folder",
            hint="move the data beside the model and save the model again",
        )
    if not path.is_file():
        raise ModelError(
            f"tensor {tensor.name!r}: its external data file {path} is missing",
            hint="copy the data file beside the model",
        )
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", tensor_bytes(tensor)))
    except ValueError as error:
        raise ModelError(f"tensor {tensor.name!r}: its external data range is malformed", hint="export it again") from error
    if offset < 0 or length != tensor_bytes(tensor) or offset + length > path.stat().st_size:
        raise ModelError(
            f"tensor {tensor.name!r}: external data file {path} is too short or its length does not fit the shape",
            hint="the data file is truncated or belongs to another model; copy it again",
        )
    return path, offset, length


def tensor_values(tensor: onnx.TensorProto, folder: Path) -> Array:
    """Return a tensor's values; an external payload is mapped, not read. Raises ``ModelError`` where it is malformed."""
    try:
        if not is_external(tensor):
            return np.asarray(numpy_helper.to_array(tensor))
        path, offset, length = external_range(tensor, folder)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if length == 0 or length != int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize:
            return np.asarray(numpy_helper.to_array(tensor, base_dir=str(folder)))
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=tuple(tensor.dims))
    except (ValueError, TypeError) as error:
        raise ModelError(f"tensor {tensor.name!r} is malformed: {error}", hint="export the model again") from error


def payload_bytes(model: Model) -> int:
    """Return the bytes of all tensors of a model, stored raw."""
    return sum(tensor_bytes(tensor) for tensor in all_tensors(model.proto))


def stored_bytes(path: Path) -> int:
    """Return the size in bytes of an ONNX file together with its external data files, each counted once."""
    proto = parse_model(path)
    files = {external_range(tensor, path.parent)[0] for tensor in all_tensors(proto) if is_external(tensor)}
    return sum(file.stat().st_size for file in {path, *files})


def save_model(model: Model, path: Path) -> None:
    """Write a model; above ``INLINE_LIMIT_BYTES`` its larger tensors go to ``<file name>.data`` beside it, one at a time.

    ``model.proto`` is not changed. The caller stages the output (``files.staged_folder``).
    """
    if payload_bytes(model) <= INLINE_LIMIT_BYTES:
        proto = inlined(model)
    else:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        data_path = path.with_name(path.name + ".data")
        with data_path.open("wb") as stream:
            for tensor in all_tensors(proto):
                if is_external(tensor) or tensor_bytes(tensor) >= _SMALL_TENSOR_BYTES:
                    _externalize(tensor, model.folder, stream, data_path.name)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def inlined(model: Model) -> onnx.ModelProto:
    """Return the model's message with external payloads read into it (a copy only where there are any)."""
    if not any(is_external(tensor) for tensor in all_tensors(model.proto)):
        return model.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in all_tensors(proto):
        if is_external(tensor):
            _inline(tensor, model.folder)
    return proto


def _inline(tensor: onnx.TensorProto, folder: Path) -> None:
    path, offset, length = external_range(tensor, folder)
    with path.open("rb") as stream:
        stream.seek(offset)
        tensor.raw_data = stream.read(length)
    _forget_location(tensor)


def _externalize(tensor: onnx.TensorProto, folder: Path, stream: Any, location: str) -> None:
    if tensor.data_type == onnx.TensorProto.STRING:
        return
    stream.write(b"\0" * (-stream.tell() % 4096))  # page-aligned, so that the runtime can map it
    offset = stream.tell()
    if tensor.HasField("raw_data"):
        stream.write(tensor.raw_data)
    else:
        stream.write(np.ascontiguousarray(tensor_values(tensor, folder)).data)
    for field in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    _forget_location(tensor)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", stream.tell() - offset)):
        tensor.external_data.add(key=key, value=str(value))


def _forget_location(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def read_signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of an ONNX file, initializers listed as inputs left out."""
    return signature(parse_model(path))


def signature(proto: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a model, initializers listed as inputs left out."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_spec(value) for value in proto.graph.input if value.name not in stored)
    return inputs, tuple(_spec(value) for value in proto.graph.output)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(f"input or output {value.name!r} is not a tensor", hint="only tensors are supported")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return TensorSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def infer_shapes(proto: onnx.ModelProto, free: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of all named tensors when the inputs have the shapes of ``free`` (large payloads are not needed)."""
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    for tensor in light.graph.initializer:
        if tensor_bytes(tensor) > _SMALL_TENSOR_BYTES:
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            _forget_location(tensor)
    for value in light.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, free.get(value.name, ()), strict=False):
            dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # shape inference is a help, never a condition: unknown shapes are reported as unknown
        return {}
    known = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {value.name: _dims(value) for value in known if value.type.tensor_type.HasField("shape")}


def _dims(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim)
