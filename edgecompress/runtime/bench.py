"""Time the models of bundles in this process, after their outputs were found right: what run.py does.

Bundles carry this file as it is: standard library, numpy and the runtime only.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgecompress.errors import FormatError, ToleranceError
from edgecompress.runtime import measure
from edgecompress.runtime.session import import_runtime, load
from edgecompress.runtime.tensors import read_tensor


def measure_bundles(
    bundles: Sequence[tuple[Path, Mapping[str, Any]]],
    *,
    runs: int,
    threads: int | None = None,
    pause_above: float | None = None,
) -> dict[str, Any]:
    """Load the models of bundles, check their outputs, let them take turns; return results, device facts and notes.

    ``bundles`` holds their folders and checked manifests; the first one says threads and execution providers for
    all. Memory is that of the process: with several models, of all of them together. Raises ``ToleranceError`` for
    wrong outputs before anything is timed, ``FormatError`` for malformed test data, and what ``load`` raises.
    """
    import_runtime()  # not to be timed
    own = bundles[0][1]
    threads = threads or int(own["threads"])
    timers = [_Timer(folder, manifest, threads, own["providers"]) for folder, manifest in bundles]
    pause = measure.Pause(pause_above)
    timings = measure.measure_timers(timers, runs=runs, before_block=pause)
    peak = measure.peak_rss_bytes()
    results = [
        {
            "model": manifest["model"],
            "outputs_match": True,
            "init_ms": timer.init_ms,
            "first_ms": timing.first_ms,
            "warmup_ms": timing.warmup_ms,
            "values_ms": timing.values_ms,
            "median_ms": float(np.median(timing.values_ms)),
            "p90_ms": float(np.percentile(timing.values_ms, 90)),
            "samples": len(timing.values_ms),
            "peak_rss_bytes": peak,
        }
        for (_, manifest), timer, timing in zip(bundles, timers, timings, strict=True)
    ]
    return {
        "target": own["target"],
        "threads": threads,
        "results": results,
        "device": measure.device_facts() | {"memory_shared": len(bundles) > 1},
        "after": {"frequency_mhz": measure.frequency_mhz(), "temperature_c": measure.temperature_c()},
        "notes": pause.notes(),
    }


def table(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return what ``measure_bundles`` gave, and the sizes of the bundle with ``manifest``, as lines for people."""
    device = result["device"]
    rows = [("device", f"{device['cpu_model']}, {device['cores']} cores, {device['os']}")]
    for model in result["results"]:
        rows += [
            ("model", f"{model['model']}, onnxruntime {device['onnxruntime']}, {result['threads']} thread(s)"),
            ("outputs", "as expected"),
            ("start", f"{model['init_ms']:.1f} ms"),
            ("first run", f"{model['first_ms']:.3f} ms"),
            ("median", f"{model['median_ms']:.3f} ms   ({model['samples']} runs)"),
            ("p90", f"{model['p90_ms']:.3f} ms"),
        ]
    shared = " for all" if device["memory_shared"] else ""
    rows.append(("memory", f"{result['results'][0]['peak_rss_bytes'] / 1e6:.1f} MB at most{shared}"))
    for name, size in manifest["sizes"].items():
        rows.append((f"{name} size", f"{size['installed_bytes']:>11,} bytes, {size['download_bytes']:>11,} compressed"))
    rows += [("note", note) for note in result["notes"]]
    return "\n".join(f"{name:<14} {value}" for name, value in rows)


class _Timer:
    """The model of a bundle, loaded; what it gives in its first run, timed like all others, is compared."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], threads: int, providers: Sequence[str]) -> None:
        self._folder, self._manifest = folder, manifest
        self._feeds = self._arrays("inputs")
        start = time.perf_counter_ns()
        self._session = load(folder / manifest["model"], threads=threads, providers=providers)
        self.init_ms = (time.perf_counter_ns() - start) / 1e6
        self._checked = False

    def __call__(self, runs: int) -> list[float]:
        if self._checked:
            return measure.time_runs(self._run, runs)
        outputs: list[Any] = []
        times = measure.time_runs(lambda: outputs.append(self._run()), 1)
        names = [output.name for output in self._session.get_outputs()]
        self._check(dict(zip(names, outputs[0], strict=True)))
        self._checked = True
        return times + self(runs - 1)

    def _run(self) -> Any:
        return self._session.run(None, self._feeds)

    def _check(self, actual: Mapping[str, Any]) -> None:
        """Compare the outputs with those that the model had where the bundle was built."""
        problems = measure.output_differences(
            actual, self._arrays("outputs"), relative=float(self._manifest["tolerance"])
        )
        if problems:
            said = "; ".join(f"{name!r} {problem}" for name, problem in problems.items())
            hint = "this processor or build of the runtime computes differently: do not use the bundle here"
            raise ToleranceError(f"wrong outputs: {said}", hint=hint)

    def _arrays(self, role: str) -> dict[str, Any]:
        arrays = {}
        for path in self._manifest[role]:
            try:
                name, arrays[name] = read_tensor((self._folder / path).read_bytes())
            except FormatError as problem:
                raise FormatError(f"{path}: {problem.message}", hint=problem.hint) from None
        return arrays
