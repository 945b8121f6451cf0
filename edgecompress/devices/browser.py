"""A browser: one of this machine without a window, or any that opens the address of the page."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgecompress.bundle import Manifest, build_bundle, verify_bundle
from edgecompress.bundle.outcome import Finished, failure
from edgecompress.devices.base import feeds_of
from edgecompress.devices.chromium import find_program, running, wait_for_result
from edgecompress.devices.program import read_result
from edgecompress.devices.web_server import PageServer
from edgecompress.errors import DeviceError, UsageError
from edgecompress.runtime.measure import device_facts, frequency_mhz, temperature_c
from edgecompress.targets import load_target

if TYPE_CHECKING:
    from edgecompress.devices.base import BenchOptions, Feeds, Progress
    from edgecompress.latency import LatencySamples

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class BrowserRunner:
    """Times models in a browser of this machine; see ``Runner``. ``program`` None takes the first that is found."""

    program: str | None = None

    def measure(
        self,
        models: Sequence[Path],
        *,
        feeds: Feeds,
        options: BenchOptions,
        progress: Progress | None = None,
    ) -> list[LatencySamples]:
        """See ``Runner.measure``: builds bundles for the target ``web``."""
        with TemporaryDirectory(prefix="edgecompress-") as name:
            folders = [Path(name) / str(index) for index in range(len(models))]
            for model, own, folder in zip(models, feeds_of(models, feeds), folders, strict=True):
                runtime = "none" if options.alternate and folder != folders[0] else "wasm"
                build_bundle(model, folder, target=load_target("web"), sample=own, runtime=runtime)
            return self.measure_bundles(folders, options=options, progress=progress)

    def measure_bundles(
        self, folders: Sequence[Path], *, options: BenchOptions, progress: Progress | None = None
    ) -> list[LatencySamples]:
        """See ``Runner.measure_bundles``."""
        groups = [folders] if options.alternate else [[folder] for folder in folders]
        found: list[LatencySamples] = []
        for group in groups:
            found += self._measure(group, options)
            if progress:
                progress(options.runs * len(found), options.runs * len(folders))
        return found

    def _measure(self, folders: Sequence[Path], options: BenchOptions) -> list[LatencySamples]:
        bundles = _served(folders)
        program = self.program or find_program()
        before = device_facts()
        with (
            PageServer(bundles, _query(options), host="127.0.0.1") as server,
            running(program, server.address("127.0.0.1"), options.cores) as process,
        ):
            sent, peak = wait_for_result(server, process, program)
        result = _checked(sent, f"the bundle {folders[0]}", "browser://")
        _complete(result, before, peak, options)
        return read_result(json.dumps(result).encode(), device="browser://", models=len(folders))


def open_device(address: str) -> BrowserRunner:
    """Return the runner of the browser whose program is ``address``; empty for the first one that is installed."""
    if address and shutil.which(address) is None:
        raise UsageError(f"{address!r} is not a program", hint="write browser:///usr/bin/chromium, or browser://")
    return BrowserRunner(address or None)


def serve(
    folders: Sequence[Path],
    *,
    options: BenchOptions,
    say: Callable[[str], None],
    host: str = "127.0.0.1",
    port: int = 0,
) -> list[LatencySamples]:
    """Serve bundles until a browser, on whatever machine, has opened the page and sent its result.

    ``say`` gets the addresses to open. Only this machine can reach them unless ``host`` says otherwise. Raises
    ``FormatError`` for a damaged bundle, ``DeviceError`` when it cannot listen, and what the page found wrong.
    """
    if options.cores or options.pause_above is not None:
        hint = "leave --cores and --pause-above away"
        raise UsageError("a page can neither choose its cores nor wait for a cooler device", hint=hint)
    with PageServer(_served(folders), _query(options), host=host, port=port) as server:
        for name in [host] if host != "0.0.0.0" else ["127.0.0.1", *_own_addresses()]:
            say(server.address(name))
        sent = None
        while sent is None:
            sent = server.wait(0.2)  # in pieces, so that Ctrl-C is heard
    result = _checked(sent, f"the bundle {folders[0]}", "the browser")
    for entry in result["results"]:
        entry["peak_rss_bytes"] = result["device"].get("wasm_memory_bytes") or 0
    return read_result(json.dumps(result).encode(), device="browser", models=len(folders))


def _own_addresses() -> list[str]:
    """Return the address under which other machines of the network see this one, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # an address of documentation: only a route is looked up, nothing is sent
        return [str(probe.getsockname()[0])]
    return []


def _served(folders: Sequence[Path]) -> list[dict[str, Path]]:
    """Verify bundles and return the files that may be read of each."""
    if not folders:
        raise UsageError("there is nothing to measure", hint="name a model or a bundle")
    manifests = [verify_bundle(folder) for folder in folders]
    if manifests[0].runtime_form != "wasm":
        raise UsageError(
            f"{folders[0]} is a bundle for {manifests[0].target}, which no browser runs",
            hint="build it with --target web; bundles after the first one may be of any target",
        )
    return [_files(folder, manifest) for folder, manifest in zip(folders, manifests, strict=True)]


def _files(folder: Path, manifest: Manifest) -> dict[str, Path]:
    return {path: folder / path for path in ("manifest.json", *manifest.files)}


def _query(options: BenchOptions) -> list[tuple[str, str]]:
    threads = [] if options.threads is None else [("threads", str(options.threads))]
    return [("runs", str(options.runs)), *threads]


def _checked(sent: bytes, subject: str, device: str) -> dict[str, Any]:
    """Return the result that a page sent, or raise what it found wrong."""
    try:
        result = json.loads(sent)
        problem = result.get("error")
        if problem:
            said = f"error: {problem['message']}\nhint: {problem['hint']}\n".encode()
            raise failure(Finished(int(problem["exit_code"]), b"", said), subject, device)
        if not isinstance(result["device"], dict) or not isinstance(result.setdefault("notes", []), list):
            raise TypeError("no facts, or notes that are no list")
        if not isinstance(result["results"], list) or not all(isinstance(entry, dict) for entry in result["results"]):
            raise TypeError("no results")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DeviceError(f"{device} sent no result that can be read", hint="build the bundle again") from None
    return dict(result)


def _complete(result: dict[str, Any], before: Mapping[str, Any], peak: int, options: BenchOptions) -> None:
    """Add what a page cannot know of this machine."""
    known = {name: value for name, value in result["device"].items() if value is not None}
    machine = ("cpu_model", "machine", "governor", "frequency_mhz", "temperature_c", "load_average")
    result["device"] = {**{name: before.get(name) for name in machine}, **known}
    result["after"] = {"frequency_mhz": frequency_mhz(), "temperature_c": temperature_c()}
    if options.pause_above is not None:
        result["notes"].append("a page cannot wait for a cooler machine: never paused")
    for entry in result["results"]:
        entry["peak_rss_bytes"] = peak
