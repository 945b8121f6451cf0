"""The `.ecz` container: a lossless codec of ONNX files (SPEC.md)."""

from __future__ import annotations

from edgecompress.container.unpack import unpack
from edgecompress.container.writer import PackResult, TensorBytes, pack

__all__ = ["PackResult", "TensorBytes", "pack", "unpack"]
