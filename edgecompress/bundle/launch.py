"""Run a bundle's own program on this machine."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompress.bundle.outcome import Finished, failure
from edgecompress.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from edgecompress.bundle.manifest import Manifest

# What starts an entry point, which is then named relative to the bundle's folder. Isolated, and without this
# interpreter's packages: the bundle has to bring its own.
_STARTERS = {"run.py": (sys.executable, "-I", "-S", "run.py"), "run.sh": ("/bin/sh", "run.sh")}


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
    starter = next((_STARTERS[name] for name in _STARTERS if (folder / name).is_file()), None)
    if starter is None:
        hint = "measure it on a device of its kind, or build it with a runtime"
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
