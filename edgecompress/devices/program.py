"""The program of a bundle, seen from outside: its arguments, and what it prints; see docs/bundle.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgecompress.bundle.manifest import CHECKSUMS
from edgecompress.bundle.outcome import clean
from edgecompress.errors import DeviceError
from edgecompress.latency import LatencySamples

if TYPE_CHECKING:
    from edgecompress.bundle import Manifest
    from edgecompress.devices.base import BenchOptions

# What is kept of a device's own words. Everything else that a program may print, its environment above all, is not.
_FACTS = (
    "cpu_model",
    "machine",
    "cores",
    "governor",
    "frequency_mhz",
    "temperature_c",
    "os",
    "load_average",
    "python",
    "numpy",
    "onnxruntime",
    "browser",
    "isolated",
    "clock_step_ms",
    "runtime_start_ms",
    "wasm_memory_bytes",
    "memory_shared",
)
# Of an emulated run these are the figures of the machine that emulates.
_OF_THE_HOST = ("cores", "governor", "frequency_mhz", "temperature_c", "load_average")
_NUMBERS = ("frequency_mhz", "temperature_c")
_TEXT_LIMIT = 200
_MOST = 2**53  # no time, count or fact is larger, and what is reckoned with them stays finite
_OUTPUT_LIMIT_BYTES = 64_000_000


def arguments(options: BenchOptions) -> list[str]:
    """Return the arguments of any bundle's program, ``--json`` left out."""
    given = ["--runs", str(options.runs)]
    if options.threads is not None:
        given += ["--threads", str(options.threads)]
    if options.cores:
        given += ["--cores", ",".join(map(str, options.cores))]
    if options.pause_above is not None:
        given += ["--pause-above", f"{options.pause_above:g}"]
    return given


def also(manifest: Manifest, others: Sequence[tuple[Manifest, str]]) -> list[str]:
    """Return the arguments by which the program of ``manifest`` times other bundles in turns, given where they lie."""
    if manifest.runtime_form == "wheel":
        return [argument for _, place in others for argument in ("--also", place)]
    return [argument for other, place in others for argument in _next_model(other, place)]


def _next_model(manifest: Manifest, place: str) -> list[str]:
    """Return the arguments that hand one more model to the native program."""
    given = ["--check", f"{place}/{CHECKSUMS}", "--next", "--model", f"{place}/{manifest.model}"]
    for flag, paths in (("--input", manifest.inputs), ("--expect", manifest.outputs)):
        given += [flag, *(f"{place}/{path}" for path in paths)]
    return [*given, "--tolerance", f"{manifest.tolerance:g}"]


def read_result(stdout: bytes, *, device: str, models: int, emulated: bool = False) -> list[LatencySamples]:
    """Return what a bundle's program printed under ``--json`` as samples; see ``samples_of``."""
    try:
        if len(stdout) > _OUTPUT_LIMIT_BYTES:
            raise ValueError(f"{len(stdout)} bytes")
        result = json.loads(stdout)
    except (ValueError, RecursionError) as error:
        raise _unreadable(device, error) from None
    return samples_of(result, device=device, models=models, emulated=emulated)


def samples_of(result: Any, *, device: str, models: int, emulated: bool = False) -> list[LatencySamples]:
    """Return the result of a bundle's program as samples, one for each of ``models``.

    Only known facts of the device are kept. Raises ``DeviceError`` when it is not what the program gives.
    """
    try:
        if len(result["results"]) != models:
            raise ValueError(f"{len(result['results'])} results instead of {models}")
        metadata = _metadata(result, device, emulated=emulated)
        return [_samples(entry, metadata, emulated) for entry in result["results"]]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _unreadable(device, error) from None


def _unreadable(device: str, error: Exception) -> DeviceError:
    said = f"{type(error).__name__}: {str(error)[:_TEXT_LIMIT]}"
    hint = "build the bundle again with this version of edgecompress"
    return DeviceError(f"the bundle's program printed no result on {device} that can be read ({said})", hint=hint)


def _samples(entry: Mapping[str, Any], metadata: Mapping[str, Any], emulated: bool) -> LatencySamples:
    if entry["outputs_match"] is not True:
        raise ValueError("outputs_match is not true")
    if not entry["values_ms"]:
        raise ValueError("no steady run")
    extra = {"instructions": _count(entry["instructions"])} if entry.get("instructions") is not None else {}
    return LatencySamples(
        init_ms=_time(entry["init_ms"]),
        first_ms=_time(entry["first_ms"]),
        warmup_ms=tuple(map(_time, entry["warmup_ms"])),
        values_ms=tuple(map(_time, entry["values_ms"])),
        peak_rss_bytes=_count(entry["peak_rss_bytes"]),
        emulated=emulated,
        metadata={**metadata, "outputs_match": True, **extra},
    )


def _metadata(result: Mapping[str, Any], device: str, *, emulated: bool) -> dict[str, Any]:
    facts, after, notes = result["device"], result.get("after") or {}, result.get("notes") or []
    if not isinstance(notes, list):
        raise TypeError("notes is not a list")
    hidden = _OF_THE_HOST if emulated else ()
    notes = [clean(str(text).encode(errors="replace"))[:_TEXT_LIMIT] for text in notes[:20]]
    return {
        **{name: _fact(name, facts.get(name)) for name in _FACTS if name in facts and name not in hidden},
        "after": {name: None if emulated else _fact(name, after.get(name)) for name in _NUMBERS},
        "notes": notes,
        "device": device,
        "threads": _count(result["threads"]),
    }


def _fact(name: str, value: Any) -> str | int | float | bool | None:
    if isinstance(value, str) and name not in _NUMBERS:
        return clean(value.encode(errors="replace"))[:_TEXT_LIMIT]
    if value is None or (isinstance(value, int | float) and abs(value) <= _MOST):  # nan is not
        return value
    raise TypeError(f"{name} is not what it should be: {type(value).__name__}")


def _time(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= _MOST:
        raise ValueError(f"{number} is not a time")
    return number


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError(f"{value!r:.40} is not a count")
    return value
