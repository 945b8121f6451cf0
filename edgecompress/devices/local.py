"""The machine that this runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edgecompress.bundle import run_program, verify_bundle
from edgecompress.errors import DeviceError, UsageError
from edgecompress.latency import LatencySamples
from edgecompress.runtime.measure import Timings, measure_timers
from edgecompress.runtime.worker import Worker

Array = npt.NDArray[Any]
Progress = Callable[[int, int], None]


class LocalRunner:
    """Times models in child processes of this one; see ``Runner``."""

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Mapping[str, Array],
        threads: int = 1,
        runs: int = 50,
        alternate: bool = True,
        low_memory: bool = False,
        progress: Progress | None = None,
    ) -> list[LatencySamples]:
        """See ``Runner.measure``."""
        workers = [partial(Worker, model, threads=threads, low_memory=low_memory) for model in models]
        metadata = {"device": "local", "threads": threads, "low_memory": low_memory, "alternating": alternate}
        if alternate:
            return _measure_together(workers, feeds, runs, metadata=metadata, progress=progress)
        samples = []
        for index, worker in enumerate(workers):
            shifted = partial(_shifted, progress, index * runs, runs * len(workers)) if progress else None
            samples += _measure_together([worker], feeds, runs, metadata=metadata, progress=shifted)
        return samples

    def measure_bundle(self, folder: Path, *, threads: int | None = None, runs: int = 50) -> LatencySamples:
        """See ``Runner.measure_bundle``."""
        return run_bundle(folder, threads=threads, runs=runs)


def open_device(address: str) -> LocalRunner:
    """Return the runner of this machine; ``address`` must be empty."""
    if address:
        raise UsageError(f"the device 'local' takes no address, got {address!r}", hint="write --device local")
    return LocalRunner()


def run_bundle(folder: Path, *, threads: int | None = None, runs: int = 50) -> LatencySamples:
    """Check every file of the bundle ``folder``, then let its own ``run.py`` check its outputs and time itself.

    It runs isolated, in an empty environment and without this interpreter's packages: the bundle has to bring its own.
    ``threads`` None takes the target's number. Raises ``FormatError`` for a damaged bundle (nothing of it has been
    executed then), ``DeviceError`` when it fails here or its outputs differ from those of the machine that built it.
    """
    verify_bundle(folder)
    result = run_program(folder, runs=runs, threads=threads)
    try:
        return LatencySamples(
            init_ms=float(result["init_ms"]),
            first_ms=float(result["first_ms"]),
            warmup_ms=tuple(map(float, result["warmup_ms"])),
            values_ms=tuple(map(float, result["values_ms"])),
            peak_rss_bytes=int(result["peak_rss_bytes"]),
            metadata={**result["device"], "device": "local", "threads": result["threads"]},
        )
    except (ValueError, KeyError, TypeError) as error:
        hint = "build the bundle again with this version of edgecompress"
        raise DeviceError(f"the bundle {folder} printed no result that can be read ({error})", hint=hint) from error


def _measure_together(
    openers: Sequence[Callable[[], Worker]],
    feeds: Mapping[str, Array],
    runs: int,
    *,
    metadata: Mapping[str, Any],
    progress: Progress | None,
) -> list[LatencySamples]:
    """Load all models, let them take turns, and return the samples of each."""
    with ExitStack() as stack:
        workers = [stack.enter_context(opener()) for opener in openers]
        for worker in workers:
            worker.time(feeds, 0)  # sends the inputs, so that the first run is timed with the rest
        timings = measure_timers([partial(worker.time, None) for worker in workers], runs=runs, progress=progress)
        return [_samples(worker, timing, metadata) for worker, timing in zip(workers, timings, strict=True)]


def _samples(worker: Worker, timing: Timings, metadata: Mapping[str, Any]) -> LatencySamples:
    return LatencySamples(
        init_ms=worker.init_ms,
        first_ms=timing.first_ms,
        warmup_ms=timing.warmup_ms,
        values_ms=timing.values_ms,
        peak_rss_bytes=worker.peak_rss_bytes(),
        metadata={**worker.facts, **metadata},
    )


def _shifted(progress: Progress, offset: int, total: int, done: int, _: int) -> None:
    """Report the progress of one model as a part of that of all."""
    progress(offset + done, total)
