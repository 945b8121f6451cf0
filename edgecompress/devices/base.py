"""What a device can do, how a measurement is asked for, and how a device is found by its address."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy.typing as npt

from edgecompress.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from edgecompress.latency import LatencySamples

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array] | Sequence[Mapping[str, Array]]  # for all models, or for each one
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """How to measure, the same on every device.

    ``threads`` None takes what the bundle's target says (1 for a model file). ``cores`` pins the process to these;
    empty leaves that to the system. Above ``pause_above`` degrees Celsius the next block of runs waits. ``alternate``
    keeps all models loaded and takes turns, so that a change of the machine's speed hits all alike; without it one is
    measured after the other and never two are in memory. ``low_memory`` is for models near the size of the memory.
    """

    threads: int | None = None
    runs: int = 50
    cores: tuple[int, ...] = ()
    pause_above: float | None = None
    alternate: bool = True
    low_memory: bool = False


def feeds_of(models: Sequence[Path], feeds: Feeds) -> Sequence[Mapping[str, Array]]:
    """Return the inputs of each of ``models``."""
    return [feeds] * len(models) if isinstance(feeds, Mapping) else feeds


class Runner(Protocol):
    """Times models on one device."""

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Feeds,
        options: BenchOptions,
        progress: Progress | None = None,
    ) -> list[LatencySamples]:
        """Time model files, on the same inputs or each on its own, and return one set of samples for each, in order.

        A device that is not this machine gets a bundle that is built for it. ``progress`` gets (done, total) runs,
        where the device tells. Raises ``ModelError`` for a model that does not run, ``DeviceError`` for a device that
        does not answer or dies, ``OutputError`` for one without space, ``ToleranceError`` for wrong outputs.
        """
        ...

    def measure_bundles(self, folders: Sequence[Path], *, options: BenchOptions) -> list[LatencySamples]:
        """Time bundles by the program and the runtime of the first one; the others need no runtime.

        All are verified before anything of them is executed. No folder at all stands for the bundle that the device
        holds itself (a container image). Raises as ``measure`` does, and ``FormatError`` for a damaged bundle.
        """
        ...


# The scheme of a device's address and the module that opens it.
_RUNNERS = {
    "local": "edgecompress.devices.local",
    "ssh": "edgecompress.devices.ssh",
    "adb": "edgecompress.devices.adb",
    "container": "edgecompress.devices.container",
    "qemu": "edgecompress.devices.qemu",
    "browser": "edgecompress.devices.browser",
}
_EXAMPLES = "local, ssh://user@host:port, adb://serial, container://image, qemu://cortex-a72, browser://"


def open_runner(device: str) -> Runner:
    """Return the runner for a device's address, ``local`` or ``SCHEME://ADDRESS``.

    Each module of a device has ``open_device(address)``, which gets what stands behind ``://``.
    Raises ``UsageError`` for an unknown scheme and for an address that the device does not take.
    """
    scheme, _, address = device.partition(":")
    if scheme not in _RUNNERS:
        raise UsageError(f"there is no device {device!r}", hint=did_you_mean(scheme, _RUNNERS))
    if address and not address.startswith("//"):
        raise UsageError(f"{device!r} is not the address of a device", hint=f"write it like one of {_EXAMPLES}")
    return cast("Runner", importlib.import_module(_RUNNERS[scheme]).open_device(address.removeprefix("//")))
