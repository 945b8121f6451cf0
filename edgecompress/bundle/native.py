"""The runtime as a C library with a program of ours, and all that both need: a device brings only its kernel."""

from __future__ import annotations

import re
import shlex
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.bundle.compiler import bench_program
from edgecompress.bundle.debian import download, unpack
from edgecompress.bundle.elf import read_elf
from edgecompress.bundle.licenses import copy_own_license, copy_runtime_licenses
from edgecompress.bundle.manifest import CHECKSUMS, LICENSES, README, Component, Job, Placed
from edgecompress.bundle.program import CODE_FOLDER
from edgecompress.bundle.wheel import fetch_wheels
from edgecompress.errors import UsageError
from edgecompress.files import sha256_of

if TYPE_CHECKING:
    from edgecompress.targets import NativeForm, Target

_ENTRY_POINT, _PROGRAM, _RUNTIME = "run.sh", "bench", "libonnxruntime.so.1"
_RUNTIME_NAME = re.compile(r"libonnxruntime\.so(\.[0-9.]+)?")
_RUNTIME_VERSION = re.compile(rb"VERS_(\d+\.\d+\.\d+)\0")  # the version of its symbols
_WHEEL_PARTS = re.compile(r"onnxruntime/(capi/libonnxruntime\.so[0-9.]*|LICENSE|ThirdPartyNotices\.txt)")


@dataclass(frozen=True)
class _Origin:
    """Unpacked work of others that files of the bundle may be taken from, with the texts of its licences."""

    component: Component
    libraries: Mapping[str, Path]
    licenses: tuple[Path, ...]


def place_runtime(job: Job) -> Placed:
    """Put the bench runner, the runtime's library, the loader and the libraries that they need into the bundle.

    The library comes out of the target's wheel or from Debian, the others from Debian. ``job.runtime_file`` replaces
    the runtime's library, or, where it is a folder of libraries, all of them. Raises ``UsageError`` naming what is
    missing, or is not for the target's machine.
    """
    native = job.target.native
    if native is None:
        raise UsageError(
            f"{job.target.name} has no table [native]", hint=f"allowed runtimes: {', '.join(job.target.forms)}"
        )
    code = job.folder / CODE_FOLDER
    code.mkdir()
    shutil.copyfile(bench_program(native.compiler), job.folder / _PROGRAM)
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as name:
        origins = list(_origins(job, native, Path(name)))
        used = _place_libraries(job, native, origins)
        for origin in used:
            version = origin.component.version.replace(":", "_")  # a colon begins an epoch; no path has it
            folder = job.folder / LICENSES / f"{origin.component.name}-{version}"
            for text in origin.licenses:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(text, folder / text.name)
    copy_own_license(job.folder / LICENSES)
    (job.folder / _ENTRY_POINT).write_text(_script(job, native.loader), encoding="utf-8")
    components = tuple(origin.component for origin in used)
    (job.folder / README).write_text(_readme(job, components), encoding="utf-8")
    for path in (job.folder / _ENTRY_POINT, job.folder / _PROGRAM, code / native.loader):
        path.chmod(0o755)
    return Placed(entry_point=_ENTRY_POINT, components=components)


def _origins(job: Job, native: NativeForm, folder: Path) -> Iterator[_Origin]:
    """Yield where libraries may come from, the preferred one first; unpack them below ``folder``."""
    given = job.runtime_file
    if given is not None:
        yield _given(given, folder / "texts")
        if given.is_dir():
            return
    elif native.runtime_from == "wheel":
        yield _from_wheel(job.target, folder / "wheel")
    packages = download(native.debian_packages, architecture=native.debian_architecture, suite=native.debian_suite)
    for package in packages:
        place = folder / package.name
        unpack(package, place)
        texts = place / "usr/share/doc" / package.name / "copyright"
        yield _Origin(package.component(), _libraries(place), (texts,) if texts.is_file() else ())


def _given(path: Path, texts: Path) -> _Origin:
    """Return what the user gave: the runtime's library, or a folder of all libraries; the licence goes to ``texts``."""
    libraries = _libraries(path) if path.is_dir() else {_RUNTIME: path}
    runtime = _runtime(libraries)
    if runtime is None or not runtime.is_file():
        raise UsageError(f"{path} holds no libonnxruntime.so", hint="give the library, or a folder with all libraries")
    found = _RUNTIME_VERSION.search(runtime.read_bytes())
    version = found[1].decode() if found else "unknown"
    copy_runtime_licenses(texts)
    component = Component("onnxruntime", version, "MIT", "file", f"pkg:generic/onnxruntime@{version}")
    return _Origin(component, libraries, tuple(sorted(texts.iterdir())))


def _from_wheel(target: Target, folder: Path) -> _Origin:
    """Take the library and its licence out of the wheel of a target."""
    path = fetch_wheels(target, [target.runtime.package], None)[0]
    folder.mkdir()
    with zipfile.ZipFile(path) as archive:
        parts = [name for name in archive.namelist() if _WHEEL_PARTS.fullmatch(name)]
        for name in parts:
            (folder / Path(name).name).write_bytes(archive.read(name))
    name, version, *_, tag = path.stem.split("-")
    component = Component(name, version, "MIT", "pip", f"pkg:pypi/{name}@{version}", (tag,), sha256_of(path))
    texts = [folder / Path(part).name for part in parts if "libonnxruntime" not in part]
    return _Origin(component, _libraries(folder), tuple(texts))


def _libraries(folder: Path) -> Mapping[str, Path]:
    """Return the shared libraries below a folder by name; links count, as the names that others need are links."""
    return {path.name: path for path in sorted(folder.rglob("*.so*"), reverse=True) if path.is_file()}


def _runtime(libraries: Mapping[str, Path]) -> Path | None:
    return next((libraries[name] for name in sorted(libraries) if _RUNTIME_NAME.fullmatch(name)), None)


def _place_libraries(job: Job, native: NativeForm, origins: Sequence[_Origin]) -> list[_Origin]:
    """Copy the runtime, the loader, and what they and the program need; return the origins of what was copied."""
    code, used = job.folder / CODE_FOLDER, []
    waiting = [(_RUNTIME, job.target.runtime.package), (native.loader, "the program")]
    waiting += [(name, _PROGRAM) for name in read_elf(job.folder / _PROGRAM).needed]
    while waiting:
        name, user = waiting.pop(0)
        if (code / name).exists():
            continue
        origin, source = _find(name, user, origins)
        elf = read_elf(source)
        if elf.machine != job.target.architecture:
            raise UsageError(f"{source} is for {elf.machine}", hint=f"{job.target.name} is {job.target.architecture}")
        shutil.copyfile(source, code / name)
        used += [] if origin in used else [origin]
        waiting += [(needed, name) for needed in elf.needed]
    return used


def _find(name: str, user: str, origins: Sequence[_Origin]) -> tuple[_Origin, Path]:
    for origin in origins:
        path = _runtime(origin.libraries) if name == _RUNTIME else origin.libraries.get(name)
        if path is not None:
            return origin, path
    places = ", ".join(origin.component.name for origin in origins)
    raise UsageError(
        f"{name}, which {user} needs, is missing: it is in none of {places}",
        hint="add the package that holds it to debian_packages in the target's file, or put it beside --runtime-file",
    )


def _script(job: Job, loader: str) -> str:
    """Return the program that starts the runner with the bundle's own loader and libraries.

    That loader and the C library run before the runner can check anything, so the system's own sha256sum comes first
    where there is one. ``EDGECOMPRESS_EMULATOR``, which runs programs of another machine, is put before the command.
    """
    arguments = ["--check", CHECKSUMS, "--library", f"{CODE_FOLDER}/{_RUNTIME}", "--target", job.target.name]
    arguments += ["--threads", str(job.target.threads), "--model", job.model]
    arguments += ["--input", *job.inputs] if job.inputs else []
    arguments += ["--expect", *job.outputs, "--tolerance", f"{job.tolerance:g}"]
    first = shlex.quote(f"{CODE_FOLDER}/{loader}")
    start = f"exec ${{EDGECOMPRESS_EMULATOR-}} {first} --library-path {CODE_FOLDER} ./{_PROGRAM}"
    return f"""#!/bin/sh
# Check every file, compare the outputs with the expected ones, time the model; --help says more.
unset CDPATH
cd -- "$(dirname -- "$0")" || exit 7
unset LD_PRELOAD LD_LIBRARY_PATH
wrong=$(LC_ALL=C sha256sum -c {CHECKSUMS} 2>/dev/null | grep -v ': OK$')
if [ -n "$wrong" ]; then
  echo "error: altered or missing: $wrong" >&2
  echo "hint: copy or build the bundle again" >&2
  exit 4
fi
[ -x {first} ] || chmod +x {first}
{start} {shlex.join(arguments)} "$@"
"""


def _readme(job: Job, components: Sequence[Component]) -> str:
    listed = "\n".join(f"  {part.name} {part.version}" for part in components)
    return f"""A model with all it needs to run on {job.target.name}: this folder and a Linux kernel.

  sh run.sh            check every file, compare the outputs with the expected ones, time the model
  sh run.sh --help     more options

Inside, with the licences in {LICENSES}/:
{listed}
  edgecompress (bench and the decoder in it)
"""
