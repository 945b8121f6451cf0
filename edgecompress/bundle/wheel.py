"""The runtime as Python wheels, installed or fetched, cut down to what inference needs, with their licences."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import edgecompress
from edgecompress.bundle import program
from edgecompress.bundle.fetch import pip_download
from edgecompress.bundle.licenses import copy_own_license
from edgecompress.bundle.manifest import LICENSES, README, Component, Job, Placed
from edgecompress.bundle.packages import (
    canonical,
    copy_distribution,
    copy_own_code,
    copy_wheel,
    distribution_of,
    needed_packages,
)
from edgecompress.bundle.program import CODE_FOLDER, MANIFEST
from edgecompress.errors import UsageError

if TYPE_CHECKING:
    from edgecompress.targets import Target, WheelForm

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_ENTRY_POINT = "run.py"


def place_runtime(job: Job) -> Placed:
    """Put the program, the runtime, what it imports, and our own decoder into the bundle.

    The packages installed here, where they are those of the target; else wheels that pip fetches; and where that is not
    possible, those installed here after all, if they run on the target's machine. Raises ``UsageError`` naming what is
    missing otherwise.
    """
    code, licenses = job.folder / CODE_FOLDER, job.folder / LICENSES
    copy_own_code(code)
    copy_own_license(licenses)
    names = needed_packages(job.target.runtime.package, job.imported)
    components, python = _place_packages(job, names, code, licenses)
    shutil.copyfile(Path(program.__file__), job.folder / _ENTRY_POINT)
    (job.folder / README).write_text(_readme(job.target.name, python, components), encoding="utf-8")
    return Placed(
        entry_point=_ENTRY_POINT,
        components=components,
        python={
            "version": python,
            "abi": f"cpython-{python.replace('.', '')}",
            "machine": job.target.architecture,
            "system": "Linux",
        },
    )


def for_installed(target: Target) -> Target:
    """Return the target with the runtime and the Python that are installed here, which then need not be fetched.

    Raises ``UsageError`` when the runtime is not installed.
    """
    if target.wheel is None:
        return target
    runtime = replace(target.runtime, version=distribution_of(target.runtime.package).version)
    return replace(target, runtime=runtime, wheel=replace(target.wheel, python=_PYTHON))


def fetch_wheels(target: Target, names: Sequence[str], given: Path | None) -> list[Path]:
    """Return the wheels of packages for a target: of those ``given``, a wheel or a folder of wheels, else by pip.

    The runtime has the version of the target; others that installed here, where the target has the same Python.
    Raises ``UsageError`` naming a wheel that is missing.
    """
    form = target.wheel
    if form is None:
        raise UsageError(f"{target.name} has no table [wheel]", hint=f"allowed runtimes: {', '.join(target.forms)}")
    wheels = {name: path for name in names if given and (path := _given_wheel(given, name, form))}
    if given and not wheels:
        tags = f"Python {form.python} on {form.platforms[0]}"
        raise UsageError(f"{given} holds no wheel of {' or '.join(names)} for {tags}", hint="give a .whl file or more")
    for name in names:
        version = importlib.metadata.version(name) if form.python == _PYTHON else ""
        if canonical(name) == canonical(target.runtime.package):
            version = target.runtime.version
        if name not in wheels:
            wheels[name] = pip_download(f"{name}=={version}" if version else name, form.platforms, form.python)
    return [wheels[name] for name in names]


def _place_packages(job: Job, names: Sequence[str], code: Path, licenses: Path) -> tuple[tuple[Component, ...], str]:
    """Place the packages from where they can be had; return them and the version of Python that they are for."""
    target, python = job.target, job.target.wheel.python if job.target.wheel else _PYTHON
    runs_here = (platform.system(), platform.machine()) == ("Linux", target.architecture)
    installed = [importlib.metadata.distribution(name) for name in names]
    if job.runtime_file is None and runs_here and for_installed(target) == target:
        return tuple(copy_distribution(distribution, code, licenses) for distribution in installed), python
    try:
        wheels = fetch_wheels(target, names, job.runtime_file)
    except UsageError:
        if job.runtime_file is not None or not runs_here:
            raise
        return tuple(copy_distribution(distribution, code, licenses) for distribution in installed), _PYTHON
    return tuple(copy_wheel(path, code, licenses) for path in wheels), python


def _given_wheel(given: Path, name: str, form: WheelForm) -> Path | None:
    """Return the wheel of a package that the user gave, if it is for this Python and platform."""
    numbers = form.python.replace(".", "")
    for path in sorted(given.glob("*.whl")) if given.is_dir() else [given]:
        parts = path.name.removesuffix(".whl").split("-")
        if path.suffix != ".whl" or len(parts) < 5 or canonical(parts[0]) != canonical(name):
            continue
        python, abi, platforms = (set(part.split(".")) for part in parts[-3:])
        pure = "py3" in python and "any" in platforms
        if pure or ((f"cp{numbers}" in python or "abi3" in abi) and platforms & set(form.platforms)):
            return path
    return None


def _readme(target: str, python: str, components: tuple[Component, ...]) -> str:
    listed = "\n".join(f"  {part.name} {part.version} ({part.license or 'see licenses/'})" for part in components)
    return f"""A model with all it needs to run on {target}: CPython {python}, the C and C++
libraries of the system, and this folder.

  python3 -I run.py            check every file, compare the outputs with the expected ones, time the model
  python3 -I run.py --help     more options

In a program of your own:

  import sys
  sys.path.insert(0, "<this folder>/{CODE_FOLDER}")
  sys.dont_write_bytecode = True          # a file that {MANIFEST} does not list makes the check fail
  from edgecompress.runtime import load
  session = load("<this folder>")         # an onnxruntime.InferenceSession

Inside:
{listed}
  edgecompress {edgecompress.__version__} (its decoder only)
"""
