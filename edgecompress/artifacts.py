"""Read any of the three outputs of a compression as a model: an ONNX file, an ``.ecz`` container, a bundle folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from onnx import ModelProto

from edgecompress.errors import ModelError
from edgecompress.model import Model, load_model
from edgecompress.model import stored_bytes as onnx_bytes
from edgecompress.runtime.decode import read_pieces
from edgecompress.runtime.format import is_ecz, open_ecz, read_container
from edgecompress.runtime.session import resolve

if TYPE_CHECKING:
    from pathlib import Path


def open_artifact(path: Path) -> Model:
    """Return the model that ``path`` stands for. External payloads of a container are not decoded.

    Raises:
        ModelError: no such file, or not a model.
        FormatError: a damaged container or bundle.
    """
    file = resolve(path)
    if not is_container(file):
        return load_model(file)
    parts: list[bytes] = []
    with open_ecz(file) as handle:
        for entry, piece in read_pieces(handle, read_container(handle)):
            if entry.name:
                break
            parts.append(bytes(piece))
    proto = ModelProto()
    try:
        proto.ParseFromString(b"".join(parts))
    except DecodeError as error:
        raise ModelError(f"{path}: what it holds is not an ONNX model", hint="pack the model again") from error
    return Model(file, proto)


def is_container(path: Path) -> bool:
    """Tell whether a file is an ``.ecz`` container, by its content."""
    try:
        with path.open("rb") as handle:
            return is_ecz(handle)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}", hint="check the path") from error


def artifact_bytes(path: Path) -> int:
    """Return the stored size in bytes of a model: external data counted; of a bundle, its model file."""
    file = resolve(path)
    # An .ort file has no external data, and no parser here.
    return file.stat().st_size if is_container(file) or file.suffix == ".ort" else onnx_bytes(file)
