"""The latency chart: every run is a dot, stacked where many took the same time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgecompress.report import text
from edgecompress.report.svg import label, line, picture

if TYPE_CHECKING:
    from edgecompress.report.model import LatencySummary

_ROW = 118  # pixels of one model
_BASE = 90  # of these, where its dots stand
_BINS = 150
_MOST_DOTS = 600


def strips(models: Sequence[tuple[str, LatencySummary]]) -> str:
    """Return one strip of dots a model on a common axis in milliseconds; runs far beyond the others are only counted.

    ``models`` are names and summaries; those without ``values_ms`` show their median and 90th percentile only.
    """
    low, high = _range([summary for _, summary in models])
    body = []
    for index, (name, summary) in enumerate(models):
        css = "neutral" if name == "original" else "solid"
        body.append(_strip(name, summary, (low, high), index * _ROW, css))
    bottom = len(models) * _ROW
    for tick in axis_ticks(low, high):
        place = _place(tick, low, high)
        anchor = "start" if place < 4 else "end" if place > 96 else "middle"
        body.append(line(place, bottom - _ROW + _BASE, bottom - _ROW + _BASE + 5, css="axis"))
        body.append(label(f"{tick:g}", place, bottom, anchor=anchor, css="tick"))
    described = "; ".join(f"{name}: median {text.format_ms(summary.median_ms)}" for name, summary in models)
    title = "time of each run in milliseconds"
    return picture("".join(body), height=bottom + 16, title=title, description=described, css="latency")


def axis_ticks(low: float, high: float, most: int = 6) -> tuple[float, ...]:
    """Return at most ``most`` round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if not high > low:
        return (low,)
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{index * step:.10g}") for index in range(first, last + 1))


def dots_per_run(count: int) -> int:
    """Return how many runs one dot stands for."""
    return max(1, math.ceil(count / _MOST_DOTS))


def _range(summaries: Sequence[LatencySummary]) -> tuple[float, float]:
    """Return the ends of the axis in ms: all runs apart from stragglers, and never less than a tenth of the median.

    A narrower axis would make noise look like a difference.
    """
    lows, highs = [], []
    for summary in summaries:
        limit = summary.p90_ms + 3 * max(summary.p90_ms - summary.median_ms, 0.02 * summary.median_ms)
        values = [value for value in summary.values_ms if value <= limit]
        lows.append(min([summary.median_ms * 0.95, *values]))
        highs.append(max([summary.median_ms * 1.05, summary.p90_ms, *values]))
    low, high = min(lows), max(highs)
    margin = 0.02 * (high - low) or 0.5
    return max(low - margin, 0.0), high + margin


def _place(value: float, low: float, high: float) -> float:
    """Return where ``value`` stands on the axis, in percent; what is outside stands at its end."""
    place = 100 * (value - low) / (high - low) if high > low else 50.0
    return min(max(place, 0.0), 100.0)


def _strip(name: str, summary: LatencySummary, ends: tuple[float, float], top: float, css: str) -> str:
    """Return the dots of one model with a line at the median and a tick at the 90th percentile."""
    low, high = ends
    base = top + _BASE
    note = f"median {text.format_ms(summary.median_ms)}  ·  p90 {text.format_ms(summary.p90_ms)}"
    body = [label(name, 0, top + 13, css="name"), label(note, 100, top + 13, anchor="end", css="value")]
    body.append(f'<line class="axis" x1="0" x2="100%" y1="{base}" y2="{base}"/>')
    seen = sorted(value for value in summary.values_ms if value <= high)
    late = [value for value in summary.values_ms if value > high]
    stride = dots_per_run(len(seen))
    columns: dict[int, int] = {}
    for value in seen[::stride]:
        column = min(int(_BINS * _place(value, low, high) / 100), _BINS - 1)
        columns[column] = columns.get(column, 0) + 1
    step = min(4.6, 62 / max(columns.values(), default=1))
    for column, count in columns.items():
        x = 100 * (column + 0.5) / _BINS
        dots = (f'<circle cx="{x:.4g}%" cy="{base - 4 - step * rank:.4g}" r="2"/>' for rank in range(count))
        body.append(f'<g class="{css}">{"".join(dots)}</g>')
    body.append(line(_place(summary.median_ms, low, high), top + 20, base + 6, css="mark"))
    body.append(line(_place(summary.p90_ms, low, high), base - 6, base + 6, css="mark tail"))
    if late:
        words = f"{len(late)} slower, up to {text.format_ms(max(late))}"
        body.append(label(words, 100, base + 13, anchor="end", css="tick"))
    return "".join(body)
