"""Measuring bundles on a device that is reached through a transport: push, run, read, and always clean up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from edgecompress.bundle import Manifest, build_bundle, verify_bundle
from edgecompress.bundle.outcome import failure
from edgecompress.bundle.program import MANIFEST
from edgecompress.devices import program
from edgecompress.devices.base import feeds_of
from edgecompress.errors import DeviceError, EdgecompressError, FormatError, UsageError
from edgecompress.targets import list_targets, load_target

if TYPE_CHECKING:
    from edgecompress.bundle.outcome import Finished
    from edgecompress.devices.base import BenchOptions, Feeds, Progress
    from edgecompress.latency import LatencySamples
    from edgecompress.targets import Target

Array = npt.NDArray[Any]

# What `uname -m` may say, apart from its own name, where the programs of an architecture run.
_RUNS_ON = {"armv7l": ("armv8l", "aarch64")}
_SHORT_S = 60.0
_PYTHON_VERSION = re.compile(r"\d+\.\d+", re.ASCII)  # it becomes part of a line of shell

Bundle = tuple[Path, Manifest]  # a folder, and its manifest, which has been verified


class Transport(Protocol):
    """A way to a device: all that a measurement needs of it."""

    @property
    def name(self) -> str:
        """The device's address, as the user wrote it."""
        ...

    @property
    def emulated(self) -> bool:
        """Whether its processor is emulated, so that its times mean nothing."""
        ...

    def machine(self) -> str:
        """Return what ``uname -m`` says there; raises ``DeviceError`` when the device cannot be reached."""
        ...

    def new_folder(self) -> str:
        """Create an empty folder that nobody else can write to and return its path."""
        ...

    def push(self, files: Mapping[str, Path], remote: str) -> None:
        """Copy files, by their paths relative to ``remote`` (created), to the device.

        Raises ``OutputError`` when it has no space for them.
        """
        ...

    def run(self, argv: Sequence[str], *, folder: str, timeout_s: float | None = None) -> Finished:
        """Run a program in ``folder`` to its end; raises ``DeviceError`` when the device is lost on the way."""
        ...

    def remove(self, remote: str) -> None:
        """End what still runs in the folder that ``new_folder`` gave, and remove it."""
        ...


@dataclass(frozen=True)
class RemoteRunner:
    """A ``Runner`` over a transport, which ``connect`` opens for one measurement."""

    connect: Callable[[], AbstractContextManager[Transport]]

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Feeds,
        options: BenchOptions,
        progress: Progress | None = None,  # noqa: ARG002 - a device says nothing before its end
    ) -> list[LatencySamples]:
        """See ``Runner.measure``: builds bundles with the native runtime of the device's architecture."""
        with self.connect() as transport, TemporaryDirectory(prefix="edgecompress-") as name:
            target = _target_for(transport)
            bundles = []
            for index, (model, own) in enumerate(zip(models, feeds_of(models, feeds), strict=True)):
                folder = Path(name) / str(index)
                runtime = "none" if options.alternate and index else "native"
                summary = build_bundle(model, folder, target=target, sample=own, runtime=runtime)
                bundles.append((folder, summary.manifest))
            return _measure_in_turn(transport, bundles, replace(options, threads=options.threads or 1))

    def measure_bundles(self, folders: Sequence[Path], *, options: BenchOptions) -> list[LatencySamples]:
        """See ``Runner.measure_bundles``."""
        if not folders:
            raise UsageError("there is nothing to measure", hint="name a model or a bundle")
        bundles = [(folder, verify_bundle(folder)) for folder in folders]  # before the device is touched at all
        _check_program(*bundles[0])
        with self.connect() as transport:
            return _measure_in_turn(transport, bundles, options)


def _measure_in_turn(transport: Transport, bundles: Sequence[Bundle], options: BenchOptions) -> list[LatencySamples]:
    """Measure all bundles together, or each by its own program where they must not be in memory together."""
    groups = [bundles] if options.alternate else [[bundle] for bundle in bundles]
    return [samples for group in groups for samples in _measure(transport, group, options)]


def _measure(transport: Transport, bundles: Sequence[Bundle], options: BenchOptions) -> list[LatencySamples]:
    """Push bundles to the device, run the first one's program over all of them, and return what it measured.

    The folder on the device is removed whatever happens, Ctrl-C included.
    """
    label, first = bundles[0]
    check_machine(first, transport.machine(), name=transport.name, emulated=transport.emulated)
    with _temporary_folder(transport) as root:
        places = [f"{root}/{index}" for index in range(len(bundles))]
        for (folder, manifest), place in zip(bundles, places, strict=True):
            transport.push({path: folder / path for path in (*manifest.files, MANIFEST)}, place)
        others = [(manifest, f"../{index}") for index, (_, manifest) in enumerate(bundles[1:], start=1)]
        given = ["--json", *program.arguments(options), *program.also(first, others)]
        done = transport.run([*_interpreter(transport, first, places[0]), *given], folder=places[0])
    if done.code:
        raise failure(done, f"the bundle {label}", transport.name)
    return program.read_result(done.stdout, device=transport.name, models=len(bundles), emulated=transport.emulated)


@contextmanager
def _temporary_folder(transport: Transport) -> Iterator[str]:
    """Yield a new folder on the device and remove it again; where that fails too, say what is left behind."""
    root = transport.new_folder()
    try:
        yield root
    except BaseException as error:
        try:
            transport.remove(root)
        except EdgecompressError:
            if isinstance(error, EdgecompressError):
                left = f"{root} may be left on the device"
                error.hint = f"{error.hint}; {left}" if error.hint else left
        raise
    transport.remove(root)


def runs_on(architecture: str, machine: str) -> bool:
    """Tell whether programs of an architecture run where ``uname -m`` says ``machine``."""
    return architecture == machine or machine in _RUNS_ON.get(architecture, ())


def _check_program(folder: Path, manifest: Manifest) -> None:
    """Raise ``UsageError`` unless the bundle brings a program that a shell starts."""
    if manifest.runtime_form not in ("wheel", "native"):
        raise UsageError(
            f"the bundle {folder} has no program for a shell (its runtime is {manifest.runtime_form!r})",
            hint="build it with --target arm64 --runtime native, or another target of the device's architecture",
        )


def check_machine(manifest: Manifest, machine: str, *, name: str, emulated: bool = False) -> None:
    """Raise ``DeviceError`` unless a bundle's program runs where ``uname -m`` says ``machine``.

    What emulates a processor takes programs of that very architecture only, whatever the processor itself would take.
    """
    if not (manifest.architecture == machine if emulated else runs_on(manifest.architecture, machine)):
        raise DeviceError(
            f"the bundle is for {manifest.architecture}, {name} is {machine}",
            hint="build it for a target of that architecture; `edgecompress targets` lists them",
        )


def _interpreter(transport: Transport, manifest: Manifest, folder: str) -> tuple[str, ...]:
    """Return the command that starts a bundle's program on the device, arguments left out."""
    if manifest.python is None:
        return ("sh", str(manifest.entry_point))
    version = str(manifest.python.get("version"))
    if not _PYTHON_VERSION.fullmatch(version):
        raise FormatError(f"the bundle names {version!r:.40} as its Python", hint="build the bundle again")
    wanted = f"command -v python{version} || command -v python3"
    found = transport.run(("sh", "-c", wanted), folder=folder, timeout_s=_SHORT_S)
    if found.code:
        raise DeviceError(
            f"{transport.name} has no Python {version}, which this bundle needs",
            hint="install it there, or build the bundle with --runtime native, which needs nothing",
        )
    return (found.stdout.decode(errors="replace").splitlines()[0], "-I", "-S", str(manifest.entry_point))


def _target_for(transport: Transport) -> Target:
    """Return the target of this tool that a device's machine runs."""
    machine = transport.machine()
    targets = [load_target(name) for name in list_targets()]
    linux = {target.architecture: target for target in targets if target.system == "linux"}
    if machine not in linux:
        raise DeviceError(
            f"{transport.name} is {machine}, for which there is no target", hint=f"known: {', '.join(linux)}"
        )
    return linux[machine]
