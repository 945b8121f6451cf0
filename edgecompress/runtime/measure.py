"""The one measuring loop, for the worker process and for a bundle's own run.py; and what is known of the machine.

Bundles carry this file as it is: standard library and numpy only.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import UsageError

Timer = Callable[[int], Sequence[float]]  # runs the model n times, returns n times in ms

_WARMUP_BATCH_MS = 50.0
_WARMUP_LIMIT_MS = 1000.0
_WARMUP_LIMIT_RUNS = 200
_STABLE = 0.05
_BLOCKS = 10
_PAUSE_LIMIT_S = 300.0
_THERMAL = Path("/sys/class/thermal")


@dataclass(frozen=True)
class Timings:
    """Times of one model in milliseconds: its first run, the runs thrown away, the steady runs in order."""

    first_ms: float
    warmup_ms: tuple[float, ...]
    values_ms: tuple[float, ...]


def time_runs(run: Callable[[], object], runs: int) -> list[float]:
    """Call ``run`` ``runs`` times and return what each call took, in milliseconds."""
    clock = time.perf_counter_ns
    samples = []
    collecting = gc.isenabled()
    gc.disable()  # a collection in the middle would be counted as inference
    try:
        for _ in range(runs):
            start = clock()
            run()
            samples.append((clock() - start) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return samples


def measure_timers(
    timers: Sequence[Timer],
    *,
    runs: int,
    progress: Callable[[int, int], None] | None = None,
    before_block: Callable[[], object] | None = None,
) -> list[Timings]:
    """Time each model ``runs`` times after a warm-up, in blocks that alternate between the models (A B A B ...).

    So a machine that slows down or wakes up in between treats all of them alike. With several models the first run
    after each change is not counted: the other one has just emptied the caches. ``progress`` gets (done, total) runs.
    ``before_block`` is called before each round of blocks, to wait for a cooler machine.
    Raises ``UsageError`` when ``runs`` is below 1.
    """
    if runs < 1:
        raise UsageError(f"{runs} runs: at least 1 is needed", hint="give --runs a positive number")
    firsts = [timer(1)[0] for timer in timers]
    warmups = [_warm_up(timer, first) for timer, first in zip(timers, firsts, strict=True)]
    values: list[list[float]] = [[] for _ in timers]
    settle = 1 if len(timers) > 1 else 0
    for size in _block_sizes(runs):
        if before_block:
            before_block()
        for timer, kept in zip(timers, values, strict=True):
            kept.extend(timer(size + settle)[settle:])
            if progress:
                progress(sum(map(len, values)), runs * len(timers))
    return [
        Timings(first, tuple(warmup), tuple(kept)) for first, warmup, kept in zip(firsts, warmups, values, strict=True)
    ]


def _block_sizes(runs: int) -> list[int]:
    """Split ``runs`` into at most ten blocks of nearly the same size."""
    blocks = min(runs, _BLOCKS)
    return [runs // blocks + (index < runs % blocks) for index in range(blocks)]


def _warm_up(timer: Timer, first_ms: float) -> list[float]:
    """Run in batches until two in a row have medians within 5 %, or for a second, or 200 times."""
    size = min(max(math.ceil(_WARMUP_BATCH_MS / max(first_ms, 1e-3)), 1), 20)
    samples = list(timer(size))
    before = float(np.median(samples))
    while sum(samples) < _WARMUP_LIMIT_MS and len(samples) < _WARMUP_LIMIT_RUNS:
        batch = timer(size)
        samples.extend(batch)
        median = float(np.median(batch))
        if abs(median - before) <= _STABLE * before:
            break
        before = median
    return samples


def peak_rss_bytes() -> int:
    """Return the most memory that this process has held so far, in bytes.

    From VmHWM where the kernel tells it, because ``ru_maxrss`` starts at the size of the parent that forked us.
    """
    status = _read("/proc/self/status")
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class Pause:
    """Waits while the machine is hotter than ``above`` degrees Celsius, at most five minutes in all; None: never."""

    above: float | None
    waited_s: float = 0.0

    def __call__(self) -> None:
        """Wait until it is cool enough, or the time is used up, or no temperature can be read."""
        while self.above is not None and (temperature_c() or -273.0) > self.above and self.waited_s < _PAUSE_LIMIT_S:
            time.sleep(1.0)
            self.waited_s += 1.0

    def notes(self) -> list[str]:
        """Return what a reader has to know of the waiting."""
        if self.above is None:
            return []
        if temperature_c() is None:
            return ["no temperature can be read here: never paused"]
        said = [f"paused for {self.waited_s:.0f} s in all"] if self.waited_s else []
        if self.waited_s >= _PAUSE_LIMIT_S:
            said.append(f"it did not cool to {self.above:g} degrees within that time: the rest ran hot")
        return said


def temperature_c() -> float | None:
    """Return the temperature of the hottest thermal zone in degrees Celsius; None where there is none."""
    zones = [_read(str(path / "temp")) for path in _THERMAL.glob("thermal_zone*")]
    found = [int(text) / 1000 for text in zones if text.lstrip("-").isdigit()]
    return max(found, default=None)


def frequency_mhz() -> float | None:
    """Return the present clock of the first core; None where the kernel does not tell."""
    text = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    return int(text) / 1000 if text.isdigit() else None


def device_facts() -> dict[str, Any]:
    """Return what a reader needs to judge a time: processor, cores, clock, heat, system, versions, load; else None."""
    system = os.uname()
    runtime = sys.modules.get("onnxruntime")  # never imported for this: it may not be what was measured
    return {
        "cpu_model": _cpu_model() or system.machine,
        "machine": system.machine,
        "cores": _cores(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "frequency_mhz": frequency_mhz(),
        "temperature_c": temperature_c(),
        "os": f"{system.sysname} {system.release}",
        "load_average": round(os.getloadavg()[0], 2),
        "python": ".".join(map(str, sys.version_info[:3])),
        "numpy": np.__version__,
        "onnxruntime": getattr(runtime, "__version__", None),
    }


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str | None:
    for name in ("model name", "Hardware", "Model"):  # x86; older and newer ARM boards
        for line in _read("/proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name and value.strip():
                return value.strip()
    return None


def _read(path: str) -> str:
    """Return the stripped text of a small file of the kernel, empty when there is none."""
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def output_differences(actual: Mapping[str, Any], expected: Mapping[str, Any], *, relative: float) -> dict[str, str]:
    """Compare a model's outputs with those it had where the bundle was built; return what is wrong by output name.

    Floating outputs may differ by ``relative`` times the largest finite magnitude of the expected output (at least
    sixteen steps of its type, for half precision); everything else, shapes and places of NaN and Inf must be equal.
    """
    problems = {}
    for name, wanted in expected.items():
        if name not in actual:
            problems[name] = "missing"
        elif problem := _difference(np.asarray(actual[name]), np.asarray(wanted), relative):
            problems[name] = problem
    return problems


def _difference(actual: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], relative: float) -> str | None:
    if actual.shape != wanted.shape:
        return f"shape {actual.shape} instead of {wanted.shape}"
    if wanted.dtype.kind != "f":
        wrong = np.asarray(actual != wanted)
        return f"{int(wrong.sum())} of {wanted.size} values differ" if wrong.any() else None
    if actual.dtype.kind != "f":
        return f"type {actual.dtype} instead of {wanted.dtype}"
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(actual)) or not np.array_equal(
        actual[~finite], wanted[~finite], equal_nan=True
    ):
        return "NaN or Inf at other places"
    exact, found = wanted[finite].astype(np.float64), actual[finite].astype(np.float64)
    if not exact.size:
        return None
    allowed = max(relative, 16 * float(np.finfo(wanted.dtype).eps)) * float(np.abs(exact).max())
    worst = float(np.abs(found - exact).max())
    return f"off by {worst:.3g}, allowed {allowed:.3g}" if worst > allowed else None
