"""A container of an image, by docker, podman or buildah, whichever works here; see Dockerfile.arm64."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgecompress.bundle.outcome import Finished, clean, failure
from edgecompress.devices import program
from edgecompress.devices.qemu import CPUS, write_system_files
from edgecompress.devices.remote import RemoteRunner, Transport, runs_on
from edgecompress.devices.shell import ShellTransport
from edgecompress.errors import DeviceError, EdgecompressError, UsageError

if TYPE_CHECKING:
    from edgecompress.devices.base import BenchOptions, Feeds, Progress
    from edgecompress.latency import LatencySamples

Array = npt.NDArray[Any]

# What Dockerfile.arm64 does: where the bundle lies in the image, and how it is started.
_BUNDLE_FOLDER = "/bundle"
_OWN_PROGRAM = 'if [ -f run.sh ]; then exec sh run.sh "$@"; fi; exec python3 -I run.py "$@"'
_IMAGE = re.compile(r"[a-z0-9][\w.:/@-]*", re.ASCII)  # never begins like an option
_SLEEP = "trap 'exit 0' TERM; while :; do sleep 1; done"
_START_S = 600.0  # an image may have to be pulled first


# A processor of each architecture that an emulated container is told to have.
_LIKE = {"aarch64": "cortex-a72", "armv7l": "cortex-a7"}


@dataclass(frozen=True)
class _Engine:
    """How a program starts a container that waits, runs a command in it, and removes it."""

    name: str
    works: tuple[str, ...]
    start: Callable[[str], tuple[str, ...]]
    enter: tuple[str, ...]
    separator: tuple[str, ...]
    remove: tuple[str, ...]


def _docker_like(name: str) -> _Engine:
    return _Engine(
        name=name,
        works=(name, "info"),
        start=lambda image: (name, "run", "--detach", "--rm", "--entrypoint", "sh", image, "-c", _SLEEP),
        enter=(name, "exec", "--interactive"),
        separator=(),  # docker takes what follows the container's name as it is
        remove=(name, "rm", "--force"),
    )


_ENGINES = (
    _docker_like("docker"),
    _docker_like("podman"),
    _Engine(
        name="buildah",
        works=("buildah", "info"),
        start=lambda image: ("buildah", "from", image),
        enter=("buildah", "run"),
        separator=("--",),
        remove=("buildah", "rm"),
    ),
)


@dataclass(frozen=True)
class ContainerRunner:
    """A ``Runner`` in a new container of ``image``, which is removed again."""

    image: str

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Feeds,
        options: BenchOptions,
        progress: Progress | None = None,
    ) -> list[LatencySamples]:
        """See ``Runner.measure``."""
        return RemoteRunner(self._start).measure(models, feeds=feeds, options=options, progress=progress)

    def measure_bundles(self, folders: Sequence[Path], *, options: BenchOptions) -> list[LatencySamples]:
        """See ``Runner.measure_bundles``; without a folder the image's own bundle is measured."""
        if folders:
            return RemoteRunner(self._start).measure_bundles(folders, options=options)
        with self._start() as transport:
            argv = ("sh", "-c", _OWN_PROGRAM, "bench", "--json", *program.arguments(options))
            done = transport.run(argv, folder=_BUNDLE_FOLDER)
        if done.code:
            raise failure(done, "its own bundle", transport.name)
        return program.read_result(done.stdout, device=transport.name, models=1, emulated=transport.emulated)

    @contextmanager
    def _start(self) -> Iterator[Transport]:
        engine, name = _engine(), f"container://{self.image}"
        done = _call(engine.start(self.image), timeout_s=_START_S)
        container = clean(done.stdout).splitlines()[-1:]
        if done.code or not container:
            said = clean(done.stderr).splitlines() or ["it said nothing"]
            hint = f"`{engine.name} images` lists the images; Dockerfile.arm64 says how one is built"
            raise DeviceError(f"{engine.name} cannot start {name}: {said[-1][:300]}", hint=hint)
        try:
            transport = ShellTransport(
                name=name,
                command=lambda line: [*engine.enter, *container, *engine.separator, "sh", "-c", line],
                lost=lambda done: _lost(done, name),
            )
            yield _as_emulated(transport)
        finally:
            _call([*engine.remove, *container], timeout_s=60)


def open_device(address: str) -> ContainerRunner:
    """Return the runner of an image; ``UsageError`` for what cannot be the name of one."""
    if not _IMAGE.fullmatch(address):
        raise UsageError(
            f"container://{address} is not the name of an image",
            hint="write container://NAME:TAG, as `images` lists it",
        )
    return ContainerRunner(address)


def _engine() -> _Engine:
    """Return the first program that is installed and works: the client of docker is often there without a server."""
    found = [engine for engine in _ENGINES if shutil.which(engine.name)]
    for engine in found:
        if _call(engine.works, timeout_s=60).code == 0:
            return engine
    if found:
        names = " and ".join(engine.name for engine in found)
        raise DeviceError(f"{names} cannot be used here", hint=f"see `{' '.join(found[0].works)}`")
    raise DeviceError("there is no docker, podman or buildah", hint="install one of them")


def _call(command: Sequence[str], *, timeout_s: float) -> Finished:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise DeviceError(
            f"`{' '.join(command[:2])}` did not end within {timeout_s:.0f} s", hint="look at what it waits for"
        ) from None
    except OSError as error:
        raise DeviceError(f"cannot start {command[0]}: {error.strerror}", hint=f"install {command[0]}") from error
    return Finished(done.returncode, done.stdout, done.stderr)


def _as_emulated(transport: ShellTransport) -> ShellTransport:
    """Return a transport that knows of the processor being emulated, if it is: the image is for another machine.

    The kernel would tell programs of the real one, on which the runtime stops; QEMU looks for files below
    ``QEMU_LD_PREFIX`` first.
    """
    machine = transport.machine()
    if runs_on(machine, platform.machine()):
        return transport
    if machine not in _LIKE:
        return replace(transport, emulated=True)
    with TemporaryDirectory(prefix="edgecompress-") as name:
        write_system_files(CPUS[_LIKE[machine]], Path(name))
        place = transport.new_folder()  # goes with the container
        transport.push(
            {path.relative_to(name).as_posix(): path for path in Path(name).rglob("*") if path.is_file()}, place
        )
    return replace(transport, emulated=True, environment={"QEMU_LD_PREFIX": place})


def _lost(done: Finished, name: str) -> EdgecompressError:
    said = clean(done.stderr).splitlines() or ["it said nothing"]
    return DeviceError(
        f"the container of {name} ended, or has no shell: {said[-1][:300]}", hint="try a shell in it by hand"
    )
