"""What a device can do, and how one is found by its name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy.typing as npt

from edgecompress.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from edgecompress.latency import LatencySamples

Array = npt.NDArray[Any]


class Runner(Protocol):
    """Times models on one device."""

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Mapping[str, Array],
        threads: int = 1,
        runs: int = 50,
        alternate: bool = True,
        low_memory: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[LatencySamples]:
        """Time every model on the same inputs and return one set of samples for each, in order.

        ``alternate`` keeps all of them loaded and takes turns, so that a change of the machine's speed hits all alike;
        without it one is measured after the other and never two are in memory. ``progress`` gets (done, total) runs.
        Raises ``ModelError`` for a model that does not run, ``DeviceError`` for a device that does not answer.
        """
        ...

    def measure_bundle(self, folder: Path, *, threads: int | None = None, runs: int = 50) -> LatencySamples:
        """Check the bundle ``folder``, run its own program and return what it measured.

        Raises ``FormatError`` for a damaged bundle, ``DeviceError`` when it fails or its outputs are wrong.
        """
        ...


# The scheme of a device's address (what stands before the first colon) and the module that opens it.
_RUNNERS = {"local": "edgecompress.devices.local"}


def open_runner(device: str) -> Runner:
    """Return the runner for ``device``, e.g. ``local``; ``UsageError`` for an unknown one."""
    scheme, _, address = device.partition(":")
    if scheme not in _RUNNERS:
        raise UsageError(f"there is no device {device!r}", hint=did_you_mean(scheme, _RUNNERS))
    return cast("Runner", importlib.import_module(_RUNNERS[scheme]).open_device(address))
