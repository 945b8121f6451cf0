"""The machine that this runs on."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgecompress.bundle import run_program, verify_bundle
from edgecompress.devices import program
from edgecompress.devices.base import feeds_of
from edgecompress.devices.remote import check_machine
from edgecompress.errors import UsageError
from edgecompress.latency import LatencySamples
from edgecompress.runtime.measure import Pause, Timings, frequency_mhz, measure_timers, temperature_c
from edgecompress.runtime.worker import Worker

if TYPE_CHECKING:
    from edgecompress.devices.base import BenchOptions, Feeds, Progress

Array = npt.NDArray[Any]


class LocalRunner:
    """Times models in child processes of this one; see ``Runner``."""

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Feeds,
        options: BenchOptions,
        progress: Progress | None = None,
    ) -> list[LatencySamples]:
        """See ``Runner.measure``."""
        threads = options.threads or 1
        workers = [
            partial(Worker, model, threads=threads, low_memory=options.low_memory, cores=options.cores)
            for model in models
        ]
        given = feeds_of(models, feeds)
        if options.alternate:
            return _measure_together(workers, given, options, progress)
        samples = []
        for index, worker in enumerate(workers):
            offset, total = index * options.runs, options.runs * len(workers)
            shifted = partial(_shifted, progress, offset, total) if progress else None
            samples += _measure_together([worker], [given[index]], options, shifted)
        return samples

    def measure_bundles(self, folders: Sequence[Path], *, options: BenchOptions) -> list[LatencySamples]:
        """See ``Runner.measure_bundles``: isolated, in an empty environment, without this interpreter's packages."""
        if not folders:
            raise UsageError("there is nothing to measure", hint="name a model or a bundle")
        places = [folder.absolute() for folder in folders]
        manifests = [verify_bundle(place) for place in places]
        if manifests[0].runtime_form in ("wheel", "native"):  # of any other it is said that it has no program
            check_machine(manifests[0], platform.machine(), name="this machine")
        others = [(manifest, str(place)) for manifest, place in zip(manifests[1:], places[1:], strict=True)]
        given = [*program.arguments(options), *program.also(manifests[0], others)]
        result = run_program(places[0], given, label=folders[0])
        return program.samples_of(result, device="local", models=len(folders))


def open_device(address: str) -> LocalRunner:
    """Return the runner of this machine; ``address`` must be empty."""
    if address:
        raise UsageError(f"the device 'local' takes no address, got {address!r}", hint="write --device local")
    return LocalRunner()


def _measure_together(
    openers: Sequence[Callable[[], Worker]],
    feeds: Sequence[Mapping[str, Array]],
    options: BenchOptions,
    progress: Progress | None,
) -> list[LatencySamples]:
    """Load all models, let them take turns, and return the samples of each."""
    pause = Pause(options.pause_above)
    with ExitStack() as stack:
        workers = [stack.enter_context(opener()) for opener in openers]
        for worker, own in zip(workers, feeds, strict=True):
            worker.time(own, 0)  # sends the inputs, so that the first run is timed with the rest
        timers = [partial(worker.time, None) for worker in workers]
        timings = measure_timers(timers, runs=options.runs, progress=progress, before_block=pause)
        metadata = {
            "device": "local",
            "threads": options.threads or 1,
            "low_memory": options.low_memory,
            "alternating": options.alternate,
            "after": {"frequency_mhz": frequency_mhz(), "temperature_c": temperature_c()},
            "notes": pause.notes(),
        }
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
