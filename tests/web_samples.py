"""Web bundles for tests: a small model with a package of onnxruntime-web that holds nothing."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from tiny import mlp

from edgecompress.bundle import BundleSummary, build_bundle
from edgecompress.targets import load_target

WEB = load_target("web")
SAMPLE = {"x": np.linspace(-1, 1, 16, dtype=np.float32).reshape(1, 16)}
PACKAGE_FILES = {
    "package.json": json.dumps({"name": "onnxruntime-web", "version": "9.9.9", "license": "MIT"}).encode(),
    "dist/ort.wasm.bundle.min.mjs": b"export {};",
    "dist/ort-wasm-simd-threaded.wasm": b"\0asm",
    "dist/ort.webgpu.min.mjs": b"not needed",
}


def package(path: Path, *, without: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in PACKAGE_FILES.items():
            if name != without:
                entry = tarfile.TarInfo(f"package/{name}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return path


def web_bundle(folder: Path, runtime_file: Path, out: str = "bundle") -> BundleSummary:
    source = mlp(folder / "m.onnx")
    return build_bundle(source, folder / out, target=WEB, sample=SAMPLE, runtime_file=runtime_file)
