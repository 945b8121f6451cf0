"""Bundles whose program is a few lines of shell: they run on any device, and say what a test wants them to say."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from edgecompress.bundle.manifest import write_checksums
from edgecompress.bundle.program import MANIFEST, SCHEMA_VERSION, manifest_digest
from edgecompress.files import sha256_of

MODEL = {
    "model": "model.onnx",
    "outputs_match": True,
    "init_ms": 5.0,
    "first_ms": 2.0,
    "warmup_ms": [1.5, 1.25],
    "values_ms": [1.0, 1.0, 3.0],
    "median_ms": 1.0,
    "p90_ms": 2.6,
    "samples": 3,
    "peak_rss_bytes": 9_000_000,
}
RESULT = {
    "schema_version": 2,
    "target": "arm64",
    "threads": 2,
    "results": [MODEL],
    "device": {"cpu_model": "Cortex", "machine": "aarch64", "cores": 4, "temperature_c": 50.5, "governor": None},
    "after": {"frequency_mhz": 1500.0, "temperature_c": 61.0},
    "notes": ["paused for 3 s in all"],
}


def printing(result: Any) -> str:
    """Return the script of a program that prints ``result``."""
    return f"cat <<'END'\n{json.dumps(result)}\nEND\n"


def script_bundle(folder: Path, script: str, *, architecture: str | None = None, payload: int = 10) -> Path:
    """Write a bundle whose run.sh is ``script`` and whose model has ``payload`` bytes."""
    (folder / "lib").mkdir(parents=True)
    for name, content in {"run.sh": script.encode(), "model.onnx": bytes(payload), "lib/tool": b"x"}.items():
        (folder / name).write_bytes(content)
    (folder / "lib" / "tool").chmod(0o755)
    write_checksums(folder)
    names = ("SHA256SUMS", "lib/tool", "model.onnx", "run.sh")
    sizes = {"installed_bytes": payload, "download_bytes": payload}
    sign(
        folder,
        {
            "schema_version": SCHEMA_VERSION,
            "target": "arm64",
            "system": "linux",
            "architecture": architecture or platform.machine(),
            "default_device": "local",
            "runtime_form": "native",
            "model": "model.onnx",
            "entry_point": "run.sh",
            "inputs": [],
            "outputs": [],
            "tolerance": 0.001,
            "threads": 1,
            "providers": [],
            "python": None,
            "runtime": {},
            "tool": {},
            "sizes": {"total": sizes},
            "files": {
                name: {"sha256": sha256_of(folder / name), "size_bytes": (folder / name).stat().st_size}
                for name in names
            },
        },
    )
    return folder


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a right checksum of its own."""
    manifest["manifest_sha256"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
