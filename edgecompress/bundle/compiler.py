"""Compile our C programs for a target: with zig, which brings all it needs, or the system's (cross) compiler."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompress.bundle.fetch import cached, refuse_full_disk
from edgecompress.errors import UsageError
from edgecompress.files import cache_folder, shared_folder

# Nothing of the place or time of compiling gets into the program: sources have relative names, there is no debug
# information and no build number.
_FLAGS = ("-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "-s", "-Wl,--build-id=none")
_BENCH = (
    *("bench.c", "bench_device.c", "bench_files.c", "bench_session.c", "bench_tensor.c", "bench_time.c"),
    *("ecz.c", "ecz_huffman.c", "ecz_inflate.c"),
)


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C for one system, and its version, which is a part of what comes out."""

    command: tuple[str, ...]
    version: str


def native_sources() -> Path:
    """Return the folder of the C sources that ship with the tool."""
    return shared_folder("targets") / "native"


def bench_program(triple: str) -> Path:
    """Return the bench runner for a target, compiled now or before; raises as ``compile_program`` does."""
    return compile_program(triple, _BENCH, name="bench", options=("-ldl",))


def find_compiler(triple: str) -> Compiler:
    """Return a compiler for a triple such as ``aarch64-linux-gnu.2.28``, whose end is the oldest glibc to run with.

    zig of the package ``ziglang`` first. The system's own compiler knows one glibc only, that of its libraries.
    Raises ``UsageError`` when there is neither.
    """
    if importlib.util.find_spec("ziglang") is not None:
        command = (sys.executable, "-m", "ziglang", "cc", "-target", triple)
        return Compiler(command, f"zig {importlib.metadata.version('ziglang')}")
    system = triple.partition(".")[0]
    names = [f"{system}-gcc"] + (["cc"] if system.partition("-")[0] == platform.machine() else [])
    found = [path for name in names if (path := shutil.which(name))]
    if not found:
        raise UsageError(
            f"there is no C compiler for {triple}",
            hint=f"pip install 'edgecompress[native]', which brings zig, or install {names[0]}",
        )
    done = subprocess.run([found[0], "--version"], capture_output=True, text=True, check=False)
    return Compiler((found[0],), done.stdout.partition("\n")[0])


def compile_program(triple: str, sources: Sequence[str], *, name: str, options: Sequence[str] = ()) -> Path:
    """Return the program ``name`` made of C sources of ``native_sources``, for the system ``triple``.

    It is kept in the user's cache, by compiler, options and content of sources and headers; the same ones give the same
    bytes. Raises ``UsageError`` when there is no compiler, or it fails.
    """
    compiler, folder = find_compiler(triple), native_sources()
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.h"), *(folder / source for source in sources)]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    key = f"{compiler.version} {triple} {' '.join((*_FLAGS, *options))} {name} {digest.hexdigest()}"

    def build(staging: Path) -> None:
        run_compiler(compiler, [*_FLAGS, *sources, *options, "-o", str(staging / name)], folder)

    return cached(key, build)[0]


def run_compiler(compiler: Compiler, arguments: Sequence[str], folder: Path) -> None:
    """Run a compiler in ``folder``; raises ``UsageError`` with its first complaint."""
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as name:
        zig = {"ZIG_GLOBAL_CACHE_DIR": str(cache_folder() / "zig"), "ZIG_LOCAL_CACHE_DIR": name}
        done = subprocess.run(
            [*compiler.command, *arguments],
            cwd=folder,
            env={**os.environ, **zig},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    if done.returncode:
        refuse_full_disk(text := done.stderr.decode(errors="replace"))
        said = text.splitlines()
        first = next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")
        raise UsageError(
            f"{' '.join(compiler.command)} failed: {first[:300]}",
            hint=f"see that {compiler.version} works, or remove it to use another compiler",
        )
