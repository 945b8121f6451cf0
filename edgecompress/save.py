"""Write ONNX models: in one file, or above 2 GB with an external data file beside it."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

import onnx

from edgecompress.errors import ModelError
from edgecompress.model import INLINE_LIMIT_BYTES, Model, payload_bytes
from edgecompress.tensors import (
    SMALL_TENSOR_BYTES,
    all_tensors,
    copy_fields,
    external_range,
    inlined_tensor,
    is_external,
    tensor_bytes,
    tensor_values,
)

if TYPE_CHECKING:
    from pathlib import Path

_PAGE_BYTES = 4096
_CHUNK_BYTES = 1 << 24
_VALUE_FIELDS = ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def save_model(model: Model, path: Path) -> None:
    """Write a model; above ``INLINE_LIMIT_BYTES`` its larger initializers go to ``<file name>.data``, one at a time.

    ``model.proto`` is not changed. The caller stages the output (``files.staged_folder``).
    """
    proto = inlined(model) if payload_bytes(model) <= INLINE_LIMIT_BYTES else _with_data_file(model, path)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def inlined(model: Model) -> onnx.ModelProto:
    """Return the model's message with external payloads read into it (a copy only where there are any)."""
    if not any(is_external(tensor) for tensor in all_tensors(model.proto)):
        return model.proto
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    _inline(proto, model.folder)
    return proto


def _inline(proto: onnx.ModelProto, folder: Path, *, skip: int = 0) -> None:
    """Read external payloads into a message, except those of its first ``skip`` tensors."""
    for tensor in islice(all_tensors(proto), skip, None):
        if is_external(tensor):
            tensor.CopyFrom(inlined_tensor(tensor, folder))


def _with_data_file(model: Model, path: Path) -> onnx.ModelProto:
    """Write the larger initializers of the main graph beside ``path``; return a message that refers to them."""
    proto = onnx.ModelProto()
    copy_fields(model.proto, proto, leave_out=("graph",))
    copy_fields(model.proto.graph, proto.graph, leave_out=("initializer",))
    name = path.name + ".data"
    with path.with_name(name).open("wb") as stream:
        for tensor in model.proto.graph.initializer:
            if tensor_bytes(tensor) < SMALL_TENSOR_BYTES or tensor.data_type == onnx.TensorProto.STRING:
                proto.graph.initializer.append(inlined_tensor(tensor, model.folder) if is_external(tensor) else tensor)
                continue
            stream.write(b"\0" * (-stream.tell() % _PAGE_BYTES))  # page-aligned, so that the runtime can map it
            offset = stream.tell()
            _write_payload(tensor, model.folder, stream)
            reference = proto.graph.initializer.add(data_location=onnx.TensorProto.EXTERNAL)
            copy_fields(tensor, reference, leave_out=(*_VALUE_FIELDS, "external_data", "data_location"))
            for key, value in (("location", name), ("offset", offset), ("length", stream.tell() - offset)):
                reference.external_data.add(key=key, value=str(value))
    _inline(proto, model.folder, skip=len(proto.graph.initializer))
    return proto


def _write_payload(tensor: onnx.TensorProto, folder: Path, stream: BinaryIO) -> None:
    """Append the raw bytes of a tensor to a file."""
    if is_external(tensor):
        source, offset, length = external_range(tensor, folder)
        with source.open("rb") as data:
            data.seek(offset)
            while length:
                piece = data.read(min(length, _CHUNK_BYTES))
                if not piece:
                    raise ModelError(f"{source} was cut short while it was read", hint="leave it alone and try again")
                stream.write(piece)
                length -= len(piece)
    elif tensor.HasField("raw_data"):
        stream.write(tensor.raw_data)
    else:
        stream.write(onnx.numpy_helper.from_array(tensor_values(tensor, folder)).raw_data)
