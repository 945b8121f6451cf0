"""The licence texts of what a bundle carries, where its package does not bring them."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

import edgecompress
from edgecompress.errors import UsageError

_RUNTIME_TEXTS = ("LICENSE", "ThirdPartyNotices.txt")


def copy_own_license(licenses: Path) -> None:
    """Copy the licence of this package's own programs to a folder of its name below ``licenses``."""
    installed = [file for file in importlib.metadata.files("edgecompress") or () if file.name == "LICENSE"]
    text = Path(str(installed[0].locate())) if installed else Path(edgecompress.__file__).parents[1] / "LICENSE"
    _copy(text, licenses / f"edgecompress-{edgecompress.__version__}" / "LICENSE")


def copy_runtime_licenses(folder: Path) -> None:
    """Copy the licence of ONNX Runtime, and the notices of what is linked into it, to ``folder``.

    They are those of the installed Python package: builds for other systems come without. Raises ``UsageError`` when
    it lacks them.
    """
    files = [Path(str(file.locate())) for file in importlib.metadata.files("onnxruntime") or ()]
    for name in _RUNTIME_TEXTS:
        texts = [path for path in files if path.name == name and path.is_file()]
        if not texts:
            raise UsageError(f"{name} of the installed onnxruntime is missing", hint="install onnxruntime with pip")
        _copy(texts[0], folder / name)


def _copy(source: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, destination)
