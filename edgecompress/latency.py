"""Latency as values: raw samples, their summary, and what makes them doubtful. No clock and no runtime in here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Below this median the call through Python (about 5 us) is a visible part of what is timed.
_SHORT_RUN_MS = 0.05
_FEW_SAMPLES = 10
_WIDE_SPREAD = 0.10
_DRIFT = 0.05
_FAR_MINIMUM = 0.7
_LATE = 1.5
_SLOWER = 0.1


@dataclass(frozen=True, kw_only=True)
class LatencySamples:
    """What was measured on one model, unreduced.

    ``init_ms`` is the creation of the session (decoding and graph optimization included), ``first_ms`` the first run,
    ``warmup_ms`` the runs thrown away, ``values_ms`` the steady runs in the order in which they ran. ``peak_rss_bytes``
    is the high-water mark of the process that held this model (and the others, where ``metadata["memory_shared"]``).
    ``emulated`` marks times that are not those of the real processor. ``metadata`` says on what and with what it was
    measured.
    """

    init_ms: float
    first_ms: float
    warmup_ms: tuple[float, ...]
    values_ms: tuple[float, ...]
    peak_rss_bytes: int
    emulated: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures that a report shows; times in milliseconds, ``samples`` is the number of steady runs."""

    init_ms: float
    first_ms: float
    median_ms: float
    p90_ms: float
    samples: int
    peak_rss_bytes: int


def summarize(samples: LatencySamples) -> Summary:
    """Reduce ``samples``: median and 90th percentile (linear interpolation) of the steady runs.

    Raises ``ValueError`` when there is no steady run.
    """
    values = _values(samples)
    return Summary(
        init_ms=samples.init_ms,
        first_ms=samples.first_ms,
        median_ms=float(np.median(values)),
        p90_ms=float(np.percentile(values, 90)),
        samples=int(values.size),
        peak_rss_bytes=samples.peak_rss_bytes,
    )


def ratio(compressed: LatencySamples, original: LatencySamples) -> float | None:
    """Return median of ``compressed`` / median of ``original``: below 1 is faster.

    ``None`` when it would mean nothing: an emulated time, or a median of zero.
    """
    if compressed.emulated or original.emulated:
        return None
    below = float(np.median(_values(original)))
    return float(np.median(_values(compressed))) / below if below > 0 else None


def stability_warnings(samples: LatencySamples) -> tuple[str, ...]:
    """Return one sentence for each reason not to trust ``samples``, most serious first; empty when there is none.

    The reasons are those of pyperf (too few, too spread, too short), judged by quartiles and not by the standard
    deviation so that one interrupted run does not condemn a hundred good ones; and a drift between the two halves.
    """
    return tuple(_warnings(samples))


def _warnings(samples: LatencySamples) -> Iterator[str]:
    values = _values(samples)
    median = float(np.median(values))
    if samples.emulated:
        yield "emulated: these times say nothing about a real device"
        return
    if values.size < _FEW_SAMPLES:
        yield f"only {values.size} runs: the spread is unknown; take {_FEW_SAMPLES} or more"
    if median < _SHORT_RUN_MS:
        yield f"a run takes {median * 1000:.1f} us: the call itself weighs in; measure a larger batch"
    if median > 0:
        yield from _spread_warnings(values, median)
    yield from machine_warnings(samples)


def machine_warnings(samples: LatencySamples) -> Iterator[str]:
    """Yield those of ``stability_warnings`` that are about the machine and not about one model."""
    before, after = (facts.get("frequency_mhz") for facts in (samples.metadata, samples.metadata.get("after") or {}))
    if isinstance(before, int | float) and isinstance(after, int | float) and after < (1 - _SLOWER) * before:
        yield f"the clock fell from {before:.0f} to {after:.0f} MHz: the device got hot, or saves power"
    load, cores = samples.metadata.get("load_average"), samples.metadata.get("cores")
    if isinstance(load, int | float) and isinstance(cores, int) and load > cores:
        yield f"the machine was busy: load {load:.1f} on {cores} cores; stop other programs"


def _spread_warnings(values: np.ndarray[Any, np.dtype[np.float64]], median: float) -> Iterator[str]:
    if values.size < 4:
        return
    low, high = (float(value) for value in np.percentile(values, (25, 75)))
    spread = (high - low) / median
    if spread > _WIDE_SPREAD:
        yield f"half of the runs spread over {spread:.0%} of the median: the machine is noisy"
    late = float(np.percentile(values, 90)) / median
    if late > _LATE:
        yield f"one run in ten takes {late:.1f} times the median or more: something else ran in between"
    half = values.size // 2
    before, after = float(np.median(values[:half])), float(np.median(values[-half:]))
    # The standard error of a median is 1.25 sigma / sqrt(n), sigma is IQR / 1.35; the halves differ by chance below
    # three errors.
    chance = 3 * np.sqrt(2) * 1.25 * (high - low) / 1.35 / np.sqrt(half)
    if abs(after - before) > max(_DRIFT * median, chance):
        yield f"the second half is {after / before - 1:+.0%} against the first: the speed drifts (heat, other programs)"
    if values.min() < _FAR_MINIMUM * median:
        yield f"the fastest run took {values.min() / median:.0%} of the median: the runs fall into two groups"


def _values(samples: LatencySamples) -> np.ndarray[Any, np.dtype[np.float64]]:
    values = np.asarray(samples.values_ms, dtype=np.float64)
    if not values.size:
        raise ValueError("no steady run was measured")
    return values
