"""A processor emulated by QEMU's user mode: what runs is what the device would run, how long it takes means nothing.

What does mean something is how many instructions an inference takes, which a plugin of QEMU counts.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompress.bundle.compiler import compile_program
from edgecompress.bundle.debian import download, unpack
from edgecompress.bundle.outcome import Finished
from edgecompress.devices.remote import RemoteRunner
from edgecompress.errors import DeviceError, UsageError, did_you_mean
from edgecompress.files import output_errors
from edgecompress.targets import load_target

# Instructions per inference are the difference of two runs of the program by the difference of their inferences.
_FEW_RUNS, _MORE_RUNS, _MOST_RUNS = 1, 4, 64
_PYTHON = re.compile(r"\bpython(3\.\d+)\b")


@dataclass(frozen=True)
class Cpu:
    """A processor that can be emulated. ``part`` is its number in ARM's list, as /proc/cpuinfo shows it."""

    name: str
    part: str
    machine: str
    program: str
    target: str
    features: str


_ARM64, _ARM32 = "fp asimd evtstrm crc32 cpuid", "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32"
CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("cortex-a53", "0xd03", "aarch64", "qemu-aarch64", "arm64", _ARM64),
        Cpu("cortex-a72", "0xd08", "aarch64", "qemu-aarch64", "arm64", _ARM64),
        Cpu("cortex-a76", "0xd0b", "aarch64", "qemu-aarch64", "arm64", f"{_ARM64} atomics fphp asimdhp asimddp"),
        Cpu("cortex-a7", "0xc07", "armv7l", "qemu-arm", "armhf", _ARM32),
    )
}


def open_device(address: str) -> RemoteRunner:
    """Return the runner of an emulated processor, e.g. ``cortex-a72``; ``UsageError`` for one that is not known."""
    if address not in CPUS:
        raise UsageError(f"qemu://{address} is not a processor that is emulated", hint=did_you_mean(address, CPUS))
    return RemoteRunner(lambda: _connected(CPUS[address]))


@contextmanager
def _connected(cpu: Cpu) -> Iterator[QemuTransport]:
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as name:
        root = Path(name) / "root"
        write_system_files(cpu, root)
        yield QemuTransport(cpu, find_emulator(cpu), root)


def write_system_files(cpu: Cpu, root: Path) -> None:
    """Write what the kernel of such a machine says of its processor, which the emulator passes to the program.

    Without them it would see this machine's, and the runtime would stop.
    """
    version = 8 if cpu.machine == "aarch64" else 7
    described = f"""processor\t: 0
BogoMIPS\t: 100.00
Features\t: {cpu.features}
CPU implementer\t: 0x41
CPU architecture: {version}
CPU variant\t: 0x0
CPU part\t: {cpu.part}
CPU revision\t: 3

Model\t\t: {cpu.name} (emulated)
"""
    files = {"proc/cpuinfo": described}
    files |= {f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online")}
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")


def find_emulator(cpu: Cpu) -> Path:
    """Return QEMU's program, the one that takes plugins first; raises ``DeviceError`` when there is none."""
    for name in (cpu.program, f"{cpu.program}-static"):
        if path := shutil.which(name):
            return Path(path)
    raise DeviceError(
        f"{cpu.name} cannot be emulated: the program {cpu.program} is not installed",
        hint="install QEMU's user mode (Debian: apt-get install qemu-user)",
    )


def counter_of(emulator: Path) -> Path | None:
    """Return the plugin that counts instructions, compiled for this emulator; None where that takes no plugins."""
    said = [
        subprocess.run([emulator, option], capture_output=True, text=True, check=False).stdout
        for option in ("-h", "--version")
    ]
    version = re.search(r"version (\d+)", said[1])
    if "-plugin" not in said[0] or version is None:
        return None
    options = ("-shared", "-fPIC", f"-DPLUGIN_API={1 if int(version[1]) < 9 else 2}")
    triple = f"{platform.machine()}-linux-gnu.2.28"
    try:
        return compile_program(triple, ("qemu/insn_count.c",), name="insn_count.so", options=options)
    except UsageError:  # a measurement without the count still checks the outputs
        return None


@dataclass(frozen=True)
class QemuTransport:
    """A ``Transport`` to a processor that is emulated on this machine. ``root`` is where programs see its files."""

    cpu: Cpu
    emulator: Path
    root: Path
    emulated: bool = True

    @property
    def name(self) -> str:
        """See ``Transport.name``."""
        return f"qemu://{self.cpu.name}"

    def machine(self) -> str:
        """See ``Transport.machine``."""
        return self.cpu.machine

    def new_folder(self) -> str:
        """See ``Transport.new_folder``."""
        return tempfile.mkdtemp(prefix="edgecompress-", dir=self.root.parent)

    def push(self, files: Mapping[str, Path], remote: str) -> None:
        """See ``Transport.push``."""
        with output_errors(Path(remote)):
            for path, source in files.items():
                place = Path(remote) / path
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)

    def remove(self, remote: str) -> None:
        """See ``Transport.remove``."""
        shutil.rmtree(remote, ignore_errors=True)

    def run(self, argv: Sequence[str], *, folder: str, timeout_s: float | None = None) -> Finished:
        """See ``Transport.run``. The program of a bundle runs twice, and its result gets the instructions."""
        if argv[:2] == ("sh", "-c"):  # it looks for the Python that a bundle of wheels needs
            if found := _PYTHON.search(argv[2]):
                self._install_python(found[1])
            return self._call(argv, folder, None, timeout_s)
        if "--also" in argv:
            raise UsageError(
                f"{self.name} runs one bundle of wheels at a time", hint="build the bundles with --runtime native"
            )
        if "--threads" in argv and argv[argv.index("--threads") + 1] != "1":
            raise UsageError(f"{self.name} counts the instructions of one thread", hint="leave --threads away")
        results = []
        for one in _one_by_one(list(argv)):
            done, result = self._measure(one, folder, timeout_s)
            if done.code:
                return done
            results.append(result)
        merged = {**results[0], "results": [entry for result in results for entry in result["results"]]}
        return Finished(0, json.dumps(merged).encode(), b"")

    def _measure(self, argv: list[str], folder: str, timeout_s: float | None) -> tuple[Finished, dict[str, Any]]:
        """Run a program for one model with few and with more inferences; return its result with what one takes."""
        plugin = counter_of(self.emulator)
        few, first, counted = self._count([*argv, "--runs", str(_FEW_RUNS)], folder, plugin, timeout_s)
        runs = _MORE_RUNS
        while not few.code and counted is not None and runs <= _MOST_RUNS:
            more, second, again = self._count([*argv, "--runs", str(runs)], folder, plugin, timeout_s)
            if more.code:
                return more, {}
            inferences = _inferences(second) - _inferences(first)
            # The warm-up does not always take the same number of them.
            if again is not None and again > counted and inferences > 0:
                second["results"][0]["instructions"] = round((again - counted) / inferences)
                return more, second
            runs *= 2
        if not few.code:
            first["notes"].append("instructions were not counted: qemu-user and a C compiler are needed")
        return few, first

    def _count(
        self, argv: list[str], folder: str, plugin: Path | None, timeout_s: float | None
    ) -> tuple[Finished, dict[str, Any], int | None]:
        """Run a program; return how it ended, its result, and how many instructions that took, where counted."""
        out, link = self.root.parent / "instructions", self.root.parent / "counter.so"
        out.unlink(missing_ok=True)
        options = []
        if plugin is not None:
            link.unlink(missing_ok=True)
            link.symlink_to(plugin)
            # The option is split at commas: seen from the bundle these paths have none, whatever folder it is in.
            options = ["-plugin", f"file={os.path.relpath(link, folder)},out={os.path.relpath(out, folder)}"]
        done = self._call(argv, folder, options, timeout_s)
        if done.code:
            return done, {}, None
        try:
            result = json.loads(done.stdout)
            _inferences(result)
            if not isinstance(result.setdefault("notes", []), list):
                raise TypeError("notes is not a list")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            raise DeviceError(
                f"{self.name} printed no result that can be read", hint="build the bundle again"
            ) from None
        return done, result, int(out.read_text()) if out.is_file() else None

    def _call(self, argv: Sequence[str], folder: str, options: list[str] | None, timeout_s: float | None) -> Finished:
        """Run a program in an empty environment: the shell is this machine's, all else is emulated."""
        emulator = [str(self.emulator), "-cpu", self.cpu.name, "-L", str(self.root), *(options or [])]
        environment = {"PATH": os.pathsep.join((str(self.root / "usr/bin"), os.defpath))}
        if argv[0] == "sh":
            # The shell splits it at spaces, which the paths of the emulator may have.
            wrapper = self.root.parent / "emulator"
            wrapper.write_text(f'exec {shlex.join(emulator)} "$@"\n', encoding="utf-8")
            environment["EDGECOMPRESS_EMULATOR"] = f"sh {os.path.relpath(wrapper, folder)}"
        # Python would compile its library in the first run only (-B: in none), and the next one would take less.
        command = [*argv] if argv[0] == "sh" else [*emulator, argv[0], "-B", *argv[1:]]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.name} did not answer within {timeout_s:.0f} s", hint="try again") from None
        code = done.returncode if done.returncode >= 0 else 128 - done.returncode
        return Finished(code, done.stdout, done.stderr)

    def _install_python(self, version: str) -> None:
        """Unpack Python of the target's Debian release to the root, with all that it and its wheels need."""
        native = load_target(self.cpu.target).native
        if native is None or (self.root / f"usr/bin/python{version}").exists():
            return
        names = (f"python{version}-minimal", f"libpython{version}-stdlib", "libstdc++6")
        for package in download(names, architecture=native.debian_architecture, suite=native.debian_suite):
            unpack(package, self.root)


def _one_by_one(argv: list[str]) -> Iterator[list[str]]:
    """Split the arguments for several models into those for each: of options given twice the last ones count."""
    starts = [index for index, argument in enumerate(argv) if argument == "--next"]
    common = argv[: starts[0]] if starts else argv
    yield common
    for start, end in zip(starts, [*starts, len(argv)][1:], strict=True):
        yield [*common, *argv[start + 1 : end]]


def _inferences(result: Mapping[str, Any]) -> int:
    """Return how many inferences a program has made: the first, the warm-up, those that were timed."""
    entry = result["results"][0]
    return 1 + len(entry["warmup_ms"]) + len(entry["values_ms"])
