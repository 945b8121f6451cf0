"""Read ONNX models: external data, files above 2 GB, the signature. Weights stay on disk until they are asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx
from numpy.typing import NDArray

from edgecompress.errors import ModelError
from edgecompress.files import sha256_of
from edgecompress.tensors import all_tensors, dtype_of, external_range, is_external, tensor_bytes, without_payloads

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np

Array = NDArray[Any]

MIN_OPSET = 9
MAX_OPSET = 26
"""The newest opset that the tested runtime (onnxruntime 1.31) loads."""

INLINE_LIMIT_BYTES = 1_800_000_000
"""A protobuf message ends at 2 GiB; models with more weight bytes are saved with an external data file."""

_STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model; ``None`` in ``shape`` is a free dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Model:
    """A model file that was read. Payloads in external files are not in ``proto``: ``tensor_values`` maps them."""

    path: Path
    proto: onnx.ModelProto

    @property
    def folder(self) -> Path:
        """The folder that external data is relative to."""
        return self.path.parent

    @property
    def opset(self) -> int:
        """The version of the standard operator set, 0 where the model names none."""
        return next((entry.version for entry in self.proto.opset_import if entry.domain in _STANDARD_DOMAINS), 0)


def load_model(path: Path) -> Model:
    """Read an ONNX file without its external payloads and check that this tool can work on it.

    Raises:
        ModelError: not an ONNX file, truncated, an opset outside ``MIN_OPSET``..``MAX_OPSET``, a tensor of an unknown
            type or impossible shape, or external data that is missing, too short or outside the model's folder.
    """
    model = Model(path, parse_model(path))
    if not MIN_OPSET <= model.opset <= MAX_OPSET:
        raise ModelError(
            f"{path}: opset {model.opset} is not supported (allowed: {MIN_OPSET} to {MAX_OPSET})",
            hint="convert it with onnx.version_converter, or store it as it is with 'edgecompress pack'",
        )
    for tensor in all_tensors(model.proto):
        tensor_bytes(tensor)
        if is_external(tensor):
            external_range(tensor, model.folder)
    return model


def parse_model(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; external payloads are not loaded. Raises ``ModelError`` with the reason."""
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
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


def model_digest(model: Model) -> str:
    """Return the SHA-256 of a model: of its file, or with external data, of the digests of all its files by name."""
    names = {external_range(tensor, model.folder)[0] for tensor in all_tensors(model.proto) if is_external(tensor)}
    digests = [sha256_of(path) for path in (model.path, *sorted(names))]
    return digests[0] if not names else hashlib.sha256("".join(digests).encode()).hexdigest()


def payload_bytes(model: Model) -> int:
    """Return the bytes of all tensors of a model, stored raw."""
    return sum(tensor_bytes(tensor) for tensor in all_tensors(model.proto))


def stored_bytes(path: Path) -> int:
    """Return the size in bytes of an ONNX file together with its external data files, each counted once."""
    proto = parse_model(path)
    files = {external_range(tensor, path.parent)[0].resolve() for tensor in all_tensors(proto) if is_external(tensor)}
    return sum(file.stat().st_size for file in {path.resolve(), *files})


def read_signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of an ONNX file, initializers listed as inputs left out."""
    return signature(parse_model(path))


def signature(proto: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a model, initializers listed as inputs left out.

    Raises ``ModelError`` for inputs or outputs that are not tensors.
    """
    stored = {tensor.name for tensor in proto.graph.initializer}
    stored.update(sparse.values.name for sparse in proto.graph.sparse_initializer)
    inputs = tuple(_spec(value) for value in proto.graph.input if value.name not in stored)
    return inputs, tuple(_spec(value) for value in proto.graph.output)


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.elem_type:
        raise ModelError(f"input or output {value.name!r} is not a tensor", hint="only tensors are supported")
    return TensorSpec(value.name, dtype_of(tensor.elem_type, value.name), _dims(value))


def _dims(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim  # some exporters write -1 for a free dimension
    return tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else None for dim in dims)


def infer_shapes(proto: onnx.ModelProto, free: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of all named tensors, as far as they are known, when the inputs have the shapes of ``free``."""
    light = without_payloads(proto)
    for value in light.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, free.get(value.name, ()), strict=False):
            dim.dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # shape inference is a help, never a condition: unknown shapes are reported as unknown
        return {}
    known = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {value.name: _dims(value) for value in known if value.type.tensor_type.HasField("shape")}
