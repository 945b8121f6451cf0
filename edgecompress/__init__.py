"""Make an ONNX model small and fast on an edge device without retraining, prove that it still works, and ship it."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Resolved on first use, so that importing the package loads neither onnx nor onnxruntime.
_PUBLIC = {
    "compress": "edgecompress.pipeline",
    "Request": "edgecompress.case",
    "Recipe": "edgecompress.recipe",
    "Settings": "edgecompress.recipe",
    "load": "edgecompress.runtime",
    "pack": "edgecompress.container",
    "unpack": "edgecompress.container",
    "EdgecompressError": "edgecompress.errors",
}

__all__ = ["EdgecompressError", "Recipe", "Request", "Settings", "__version__", "compress", "load", "pack", "unpack"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'edgecompress' has no attribute {name!r}")
