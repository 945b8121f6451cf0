"""Run a bundle's own program on this machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgecompress.bundle.manifest import Manifest, read_manifest
from edgecompress.bundle.outcome import Finished, failure
from edgecompress.errors import DeviceError, UsageError

# What starts an entry point, which is then named relative to the bundle's folder. Isolated, and without this
# interpreter's packages: the bundle has to bring its own.
_STARTERS = {"run.py": (sys.executable, "-I", "-S", "run.py"), "run.sh": ("/bin/sh", "run.sh")}
_MODULE = "build it into an application; to time the model alone, bundle it with --target arm64 --runtime native"
_HINTS = {
    "none": "time it on the runtime of another bundle: edgecompress bench OTHER THIS; or build it with a runtime",
    "gradle": _MODULE,
    "swift": _MODULE,
}


def runs_here(manifest: Manifest) -> bool:
    """Tell whether this machine, and this Python where one is needed, are what a bundle was built for."""
    if manifest.entry_point not in _STARTERS or manifest.system != platform.system().lower():
        return False
    if manifest.python is not None and manifest.python.get("abi") != sys.implementation.cache_tag:
        return False
    return manifest.architecture == platform.machine()


def run_program(folder: Path, arguments: Sequence[str], *, label: Path | None = None) -> dict[str, Any]:
    """Run the program of the bundle ``folder``, which the caller has verified, and return what it printed.

    It gets ``--json`` and ``arguments``, an empty environment, and the bundle as its folder. ``label`` names the bundle
    in messages. Raises what its exit code stands for, as the command line does, and ``DeviceError`` when it dies.
    """
    label = label or folder
    manifest = read_manifest(folder)  # what lies in the folder beside the files that it lists is never run
    starter = _STARTERS.get(manifest.entry_point or "")
    if starter is None:
        hint = _HINTS.get(manifest.runtime_form, "measure it on a device of its kind")
        raise UsageError(f"the bundle {label} has no program that runs here", hint=hint)
    command = [*starter, "--json", *arguments]
    done = subprocess.run(command, cwd=folder, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        code = done.returncode if done.returncode > 0 else 128 - done.returncode
        raise failure(Finished(code, done.stdout, done.stderr), f"the bundle {label}", "this machine")
    try:
        result = json.loads(done.stdout)
    except ValueError:
        result = None
    if not isinstance(result, dict):
        raise DeviceError(f"the bundle {label} printed no result", hint="build the bundle again")
    return result
