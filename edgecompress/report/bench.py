"""What ``bench`` says: one row a model, in the order in which they were named, and one line on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgecompress.latency import LatencySamples, ratio, stability_warnings, summarize
from edgecompress.report import text

# Facts of a model among those of the device.
_OF_THE_MODEL = ("outputs_match", "instructions")


def bench_rows(
    names: Sequence[str], samples: Sequence[LatencySamples], sizes: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Return one row for each model, with the keys of ``bench --json``; ratios are to the first one.

    Of an emulated run only the instructions are told: its times and its memory mean nothing. ``outputs_match`` is None
    where there was nothing to compare with.
    """
    rows = []
    for name, each, size in zip(names, samples, sizes, strict=True):
        summary = summarize(each)
        instructions = each.metadata.get("instructions")
        times = {
            "init_ms": summary.init_ms,
            "first_ms": summary.first_ms,
            "median_ms": summary.median_ms,
            "p90_ms": summary.p90_ms,
            "warmup_ms": list(each.warmup_ms),
            "values_ms": list(each.values_ms),
        }
        rows.append(
            {
                "model": name,
                "size_bytes": size,
                "samples": summary.samples,
                **(dict.fromkeys(times) if each.emulated else times),
                "ratio": _ratio(each, samples[0]),
                "instructions": instructions,
                "emulated": each.emulated,
                "peak_rss_bytes": None if each.emulated else summary.peak_rss_bytes,
                "outputs_match": each.metadata.get("outputs_match"),
                "warnings": list(stability_warnings(each)),
            }
        )
    return rows


def _ratio(samples: LatencySamples, first: LatencySamples) -> float | None:
    """Return the ratio of the medians, of the instructions where the times are emulated."""
    own, others = (each.metadata.get("instructions") for each in (samples, first))
    return float(own / others) if samples.emulated and own and others else ratio(samples, first)


def device_facts(samples: LatencySamples) -> dict[str, Any]:
    """Return what is known of the device and the measurement, without what belongs to one model."""
    return {key: value for key, value in samples.metadata.items() if key not in _OF_THE_MODEL}


def device_line(facts: Mapping[str, Any]) -> str:
    """Return the device in one line: processor, cores, governor, clock and heat before and after, system, runtime."""
    after = facts.get("after") or {}
    runtime = facts.get("onnxruntime")
    parts = (
        facts.get("cpu_model"),
        f"{facts['cores']} cores" if facts.get("cores") else None,
        facts.get("governor"),
        _change(facts.get("frequency_mhz"), after.get("frequency_mhz"), "MHz"),
        _change(facts.get("temperature_c"), after.get("temperature_c"), "°C"),
        facts.get("os"),
        f"onnxruntime {runtime}" if runtime else None,
    )
    return text.printable(", ".join(str(part) for part in parts if part))


def _change(before: float | None, after: float | None, unit: str) -> str | None:
    known = [f"{value:.0f}" for value in (before, after) if value is not None]
    return f"{' → '.join(dict.fromkeys(known))} {unit}" if known else None
