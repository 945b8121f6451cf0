"""Build ONNX Runtime with nothing but what one model needs; see docs/runtime.md."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.bundle.model_files import as_onnx
from edgecompress.bundle.ort import Usability, convert_to_ort, mobile_usability
from edgecompress.errors import DeviceError, UsageError
from edgecompress.files import cache_folder, output_errors, refuse_existing, staged_folder

if TYPE_CHECKING:
    from edgecompress.targets import Target

_SCRIPT, _VERSION = Path("tools/ci_build/build.py"), Path("VERSION_NUMBER")
_LIBRARY = "libonnxruntime.so"
_PROGRESS = re.compile(r"^\[ *(\d+)/(\d+)\]|^\[ *(\d+)(%)\]")  # of ninja, of make

# The smallest library that opens .ort files: no parser of ONNX, no optimizers but those that the file refers to, only
# the kernels and types of the list, no classical machine learning, no symbols.
_REDUCED = (
    "--config=MinSizeRel",
    "--build_shared_lib",
    "--minimal_build=extended",
    "--enable_reduced_operator_type_support",
    "--disable_ml_ops",
    "--disable_rtti",
    "--skip_submodule_sync",
    "--skip_tests",
    "--parallel",
    "--cmake_extra_defines=onnxruntime_BUILD_UNIT_TESTS=OFF",
    "--cmake_extra_defines=CMAKE_SHARED_LINKER_FLAGS_MINSIZEREL=-s",
)


def _cross(processor: str, prefix: str) -> tuple[str, ...]:
    defines = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": processor,
        "CMAKE_C_COMPILER": f"{prefix}-gcc",
        "CMAKE_CXX_COMPILER": f"{prefix}-g++",
        "onnxruntime_ENABLE_CPUINFO": "OFF",  # its own build does not know that it is cross-compiled
    }
    return tuple(f"--cmake_extra_defines={name}={value}" for name, value in defines.items())


# By system and architecture. The kits for phones are found by ANDROID_HOME and ANDROID_NDK_HOME, or by Xcode itself.
_FLAGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("linux", "x86_64"): (),
    ("linux", "aarch64"): ("--arm64", *_cross("aarch64", "aarch64-linux-gnu")),
    ("linux", "armv7l"): ("--arm", *_cross("armv7l", "arm-linux-gnueabihf")),
    ("android", "universal"): ("--android", "--android_abi=arm64-v8a", "--android_api=27"),
    ("ios", "universal"): ("--ios", "--use_xcode", "--apple_sysroot=iphoneos", "--osx_arch=arm64"),
    ("web", "wasm32"): ("--build_wasm", "--enable_wasm_simd", "--enable_wasm_threads"),
}


@dataclass(frozen=True, kw_only=True)
class Operators:
    """The operators of one domain and opset that a model uses, e.g. ``ai.onnx``, 13, ``("Add", "Gemm")``."""

    domain: str
    opset: int
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RuntimeNeeds:
    """What a model needs of a runtime.

    ``config`` is the text of ``required_operators_and_types.config``, ``operators`` the same without the types,
    ``ort_bytes`` the size of the model in the form that reduced runtimes open.
    """

    config: str
    operators: tuple[Operators, ...]
    ort_bytes: int
    usability: tuple[Usability, ...]


@dataclass(frozen=True, kw_only=True)
class ReducedRuntime:
    """A runtime that was built, and the ``model.ort`` that goes with it; ``cached`` where it is of an earlier build."""

    library: Path
    model: Path
    version: str
    cached: bool


def runtime_needs(source: Path, folder: Path | None = None, *, force: bool = False) -> RuntimeNeeds:
    """Return what the model at ``source`` (a folder written by ``compress``, .onnx or .ecz) needs of a runtime.

    With ``folder``, ``model.ort`` and ``required_operators_and_types.config`` are written there.
    Raises ``ModelError`` where the runtime's own tools refuse the model, ``OutputError`` where it cannot be written.
    """
    if folder is not None:
        refuse_existing(folder, force=force)
    with as_onnx(source) as model, tempfile.TemporaryDirectory() as name:
        ort, config = convert_to_ort(model, Path(name))
        text = config.read_text(encoding="utf-8")
        if folder is not None:
            with staged_folder(folder, force=force) as staging:
                for path in (ort, config):
                    shutil.copyfile(path, staging / path.name)
        usability = mobile_usability(model)
        return RuntimeNeeds(config=text, operators=_operators(text), ort_bytes=ort.stat().st_size, usability=usability)


def build_command(tree: Path, config: Path, build: Path, target: Target, *, defines: Sequence[str] = ()) -> list[str]:
    """Return the command that builds the runtime of the source ``tree`` with the operators of ``config`` alone.

    ``build`` is the folder for its products, ``defines`` are settings for CMake as ``NAME=VALUE``. Raises
    ``UsageError`` for a kind of machine that no build is known for.
    """
    command = [sys.executable, str(tree / _SCRIPT), f"--build_dir={build}", *_REDUCED]
    if (target.system, target.architecture) not in _FLAGS:
        raise UsageError(
            f"no build of the runtime is known for {target.system} on {target.architecture}",
            hint="known: " + ", ".join(" on ".join(key) for key in _FLAGS),
        )
    command += [f"--include_ops_by_config={config}", *_FLAGS[target.system, target.architecture]]
    command += [f"--cmake_extra_defines={define}" for define in defines]
    if shutil.which("ninja"):
        command.append("--cmake_generator=Ninja")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow_running_as_root")
    return command


def build_runtime(
    source: Path,
    destination: Path,
    *,
    tree: Path,
    target: Target,
    defines: Sequence[str] = (),
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReducedRuntime:
    """Build ONNX Runtime for one model and put the library, ``model.ort`` and the list of operators in ``destination``.

    ``tree`` is a source tree of ONNX Runtime. Takes half an hour on two cores; a build that was interrupted goes on
    where it stopped, and one for the same operators, source version and target is taken from the user's cache.
    ``progress`` gets (done, total) steps. Raises ``UsageError`` for a folder that is no such tree or a target whose
    library cannot be built so, ``ModelError`` for the model, ``DeviceError`` when the build fails.
    """
    version = _source_version(tree)
    if target.system != "linux":
        raise UsageError(
            f"runtime-build makes libraries for Linux targets, not for {target.name}",
            hint="run the command that `edgecompress runtime-config` prints where its kit is installed",
        )
    with staged_folder(destination, force=force) as staging:
        config = runtime_needs(source, staging).config
        key = "\n".join((version, target.system, target.architecture, *_REDUCED, *sorted(defines), config))
        folder = cache_folder() / "runtime" / hashlib.sha256(key.encode()).hexdigest()[:24]
        cached = (folder / _LIBRARY).is_file()
        if not cached:
            _build(tree.absolute(), folder, config, target, defines=defines, progress=progress)
        shutil.copyfile(folder / _LIBRARY, staging / _LIBRARY)
    return ReducedRuntime(
        library=destination / _LIBRARY, model=destination / "model.ort", version=version, cached=cached
    )


def _build(
    tree: Path,
    folder: Path,
    config: str,
    target: Target,
    *,
    defines: Sequence[str],
    progress: Callable[[int, int], None] | None,
) -> None:
    """Run the build in ``folder`` and leave the library there; its products are removed when it has succeeded."""
    build, log = folder / "build", folder / "build.log"
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "operators.config").write_text(config, encoding="utf-8")
    command = build_command(tree, folder / "operators.config", build, target, defines=defines)
    last = _run(command, log, progress)
    found = sorted((build / "MinSizeRel").glob(f"{_LIBRARY}*"))
    if last is not None or not found:
        raise DeviceError(
            f"the build of ONNX Runtime failed: {last or 'it made no library'}",
            hint=f"see {log}; what it lacks can be given with --define NAME=VALUE; run it again to go on",
        )
    staging = folder / f".{_LIBRARY}"
    shutil.copyfile(found[-1].resolve(), staging)
    staging.replace(folder / _LIBRARY)
    shutil.rmtree(build, ignore_errors=True)


def _run(command: Sequence[str], log: Path, progress: Callable[[int, int], None] | None) -> str | None:
    """Run the build, keep what it prints in ``log``, and return why it failed, or None."""
    tail: deque[str] = deque(maxlen=200)
    with output_errors(log), log.open("w", encoding="utf-8") as stream:
        stream.write(f"{shlex.join(command)}\n")
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it has started ends with it
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    stream.write(line)
                    tail.append(line.strip())
                    if progress and (found := _PROGRESS.match(line)):
                        done, total = (found[1], found[2]) if found[1] else (found[3], "100")
                        progress(int(done), int(total))
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
    if process.returncode == 0:
        return None
    errors = [line for line in tail if re.search(r"\berror: ", line)]
    return (errors[:1] or [*tail][-1:] or [f"exit code {process.returncode}"])[0][:300]


def _source_version(tree: Path) -> str:
    """Return the version of a source tree of ONNX Runtime."""
    try:
        version = (tree / _VERSION).read_text(encoding="utf-8").strip()
        if (tree / _SCRIPT).is_file() and re.fullmatch(r"[\w.+-]{1,40}", version):
            return version
    except (OSError, ValueError):
        pass
    raise UsageError(
        f"{tree} is not a source tree of ONNX Runtime: it lacks {_SCRIPT} or {_VERSION}",
        hint="get one with: git clone --recursive --branch v1.31.1 (ONNX Runtime's repository)",
    )


def _operators(config: str) -> tuple[Operators, ...]:
    """Return the operators of a config: lines of ``domain;opset;Name{types},Name``, with nested braces of types."""
    found = []
    for line in config.splitlines():
        if not line.strip() or line.startswith(("#", "!")):
            continue
        domain, opset, rest = line.split(";", 2)
        depth, bare = 0, ""
        for letter in rest:
            depth += (letter == "{") - (letter == "}")
            bare += letter if depth == 0 and letter != "}" else ""
        names = tuple(sorted(filter(None, bare.split(","))))
        found.append(Operators(domain=domain, opset=int(opset), names=names))
    return tuple(found)
