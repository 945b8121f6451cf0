"""The charts as SVG text: sizes, spectra, histograms.

A chart is as wide as its place: lengths across are percentages, so that text keeps its size on every screen. Curves
live in an inner picture that is stretched (``preserveAspectRatio="none"``) while its strokes are not. Colours are the
style sheet's, by class. Every chart has a title and a description for those who do not see it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgecompress.report import text

if TYPE_CHECKING:
    from edgecompress.report.model import LayerPlot, StageBytes

_MOST_STEPS = 240  # more steps than a small chart has pixels only make the file bigger
_MOST_DECADES = 4
_MINI = 32  # pixels of the charts under the three figures


def escape(words: str) -> str:
    """Return text that can stand in an HTML or SVG element or attribute, whatever it holds."""
    return html.escape(text.printable(words), quote=True)


def name_markup(name: str, limit: int = 44) -> str:
    """Return a layer's or output's name as code: long ones cut in the middle, with the whole name on hover.

    A line may break behind the character that parts such names.
    """
    words = escape(text.shorten(name, limit))
    part = next((mark for mark in "/._" if mark in words), "/")
    return f'<code title="{escape(name)}">{words.replace(part, part + "<wbr>")}</code>'


def picture(body: str, *, height: int, title: str, description: str, css: str) -> str:
    """Return an SVG as wide as its place and ``height`` pixels high."""
    words = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    start = f'<svg class="{css}" role="img" aria-label="{escape(f"{title}: {description}")}"'
    return f'{start} width="100%" height="{height}">{words}{body}</svg>'


def label(words: str, x: float, y: float, *, anchor: str = "start", css: str = "") -> str:
    """Return text at ``x`` percent and ``y`` pixels."""
    return f'<text class="{css}" x="{x:.5g}%" y="{y:.5g}" text-anchor="{anchor}">{escape(words)}</text>'


def bar(x: float, width: float, y: float, height: float, *, css: str) -> str:
    """Return a rectangle: ``x`` and ``width`` in percent, ``y`` and ``height`` in pixels."""
    return f'<rect class="{css}" x="{x:.5g}%" y="{y:.5g}" width="{max(width, 0):.5g}%" height="{height:.5g}"/>'


def line(x: float, top: float, bottom: float, *, css: str) -> str:
    """Return a vertical line at ``x`` percent, from ``top`` to ``bottom`` in pixels."""
    return f'<line class="{css}" x1="{x:.5g}%" x2="{x:.5g}%" y1="{top:.5g}" y2="{bottom:.5g}"/>'


def pair_of_bars(whole: float, part: float, description: str) -> str:
    """Return two thin bars on one scale, the original above the compressed."""
    longest = max(whole, part, 0.0) or 1.0
    body = bar(0, 100 * whole / longest, 2, 7, css="neutral") + bar(0, 100 * part / longest, 12, 7, css="solid")
    return picture(body, height=_MINI, title="original above compressed", description=description, css="mini")


def share_bar(percent: float) -> str:
    """Return a bar of ``percent`` on a track of a hundred."""
    body = bar(0, 100, 2, 7, css="ghost") + bar(0, min(max(percent, 0), 100), 2, 7, css="solid")
    return picture(body, height=_MINI, title="share", description=f"{percent:.3g} percent", css="mini")


def inline_bar(after: float, before: float, longest: float) -> str:
    """Return a bar for a table cell: what is left (``after``) lies over what there was (``before``)."""
    scale = 100 / longest if longest > 0 else 0.0
    ghost = bar(0, before * scale, 3, 6, css="ghost") if before > after else ""
    # Something that is there is seen, however small
    solid = bar(0, max(after * scale, 0.8 if after > 0 else 0), 3, 6, css="solid")
    return f'<svg class="bar" aria-hidden="true" height="12">{ghost}{solid}</svg>'


def interval(drop: float, error: float) -> str:
    """Return a change with one (thick) and two (thin) standard errors about it, against a line at no change."""
    error = abs(error)
    reach = max(abs(drop) + 2.2 * error, 1e-9)
    places = [50 - 45 * (drop + step * error) / reach for step in (-2, -1, 0, 1, 2)]
    body = "".join((
        line(50, 1, 20, css="axis"),
        bar(places[4], places[0] - places[4], 10.5, 1, css="solid"),
        bar(places[3], places[1] - places[3], 9, 4, css="solid"),
        f'<circle class="point" cx="{places[2]:.5g}%" cy="11" r="5"/>',
        label("no change", 50, 30, anchor="middle", css="tick"),
    ))  # fmt: skip
    described = f"{drop:.3g} worse, standard error {error:.3g}; the upright line is no change"
    return picture(body, height=_MINI, title="change and its standard error", description=described, css="mini")


def waterfall(stages: Sequence[StageBytes]) -> str:
    """Return one bar a stage: what is left of the bytes, and beside it what this stage took away or added."""
    longest = max([stage.bytes for stage in stages] or [0]) or 1
    row, body = 46, []
    for index, stage in enumerate(stages):
        top = index * row
        here = 100 * stage.bytes / longest
        before = 100 * stages[max(index - 1, 0)].bytes / longest
        body.append(label(text.shorten(stage.stage, 30), 0, top + 13, css="name"))
        body.append(label(_stage_note(stages, index), 100, top + 13, anchor="end", css="value"))
        body.append(bar(here, before - here, top + 20, 13, css="ghost"))
        body.append(bar(0, min(here, before), top + 20, 13, css="solid" if index else "neutral"))
        body.append(bar(before, here - before, top + 20, 13, css="more"))
    described = "; ".join(f"{stage.stage}: {text.format_bytes(stage.bytes)}" for stage in stages)
    height = row * len(stages)
    return picture("".join(body), height=height, title="bytes after each stage", description=described, css="waterfall")


def decades(plots: Sequence[LayerPlot]) -> int:
    """Return how many powers of ten all spectra need, 1 to 4, so that they share one scale."""
    lowest, least = 1.0, 10.0**-_MOST_DECADES
    for plot in plots:
        top = max(plot.singular_values, default=0.0)
        lowest = min([lowest, *(value / top for value in plot.singular_values if top > 0 and value > 0)])
    return max(math.ceil(-math.log10(max(lowest, least))), 1)


def spectrum(plot: LayerPlot, scale_decades: int) -> str:
    """Return the singular values of one layer, relative to the largest, on a log scale; those kept are shaded."""
    top, count, height = max(plot.singular_values, default=0.0), len(plot.singular_values), 84
    levels = [_log_height(value / top if top > 0 else 0.0, scale_decades) for value in plot.singular_values]
    kept = count if plot.rank is None else min(max(plot.rank, 0), count)
    split = 100 * kept / count if count else 100.0
    curves = _steps(levels, 0, kept, css="kept")
    curves += _steps(levels, kept, count, css="cut")
    body = [_stretched(curves, 0, height)]
    body.append(_across(height, css="axis"))
    for power in range(scale_decades):
        body.append(_across(height * power / scale_decades, css="grid"))
        words = "1" if power == 0 else f"0.{'0' * (power - 1)}1"
        body.append(label(words, 100, height * power / scale_decades + 10, anchor="end", css="tick"))
    if plot.rank is not None and count:
        body.append(line(split, 0, height + 4, css="mark"))
        anchor = "start" if split < 15 else "end" if split > 80 else "middle"
        body.append(label(f"rank {kept}", split, height + 16, anchor=anchor, css="strong"))
    if plot.rank is None or split < 62:
        body.append(label(str(count), 100, height + 16, anchor="end", css="tick"))
    described = f"{count} values; " + ("all kept" if plot.rank is None else f"rank {kept} kept")
    title = f"singular values of {plot.name}"
    return picture("".join(body), height=height + 20, title=title, description=described, css="small")


def histogram(plot: LayerPlot) -> str:
    """Return the distribution of one layer's weights with a tick below it for every entry of the codebook."""
    height, rug = 70, 12
    ends = [*plot.histogram_edges, *plot.codebook, 0.0]
    low, high = min(ends), max(ends)
    span = high - low if high > low else 1.0
    places = [100 * (edge - low) / span for edge in plot.histogram_edges]
    most = max(plot.histogram_counts, default=0) or 1
    steps = zip(plot.histogram_counts, places, places[1:], strict=False)
    points = "".join(f"V{100 - 100 * n / most:.4g}H{right:.5g}" for n, _, right in steps)
    start = places[0] if places else 0
    shape = f'<path class="neutral" d="M{start:.5g} 100{points}V100Z"/>' if points else ""
    ticks = "".join(f"M{100 * (entry - low) / span:.5g} 0V100" for entry in sorted(set(plot.codebook)))
    body = [_stretched(shape, 0, height), _across(height, css="axis")]
    if ticks:
        body.append(_stretched(f'<path class="rug" d="{ticks}"/>', height + 3, rug))
    zero = 100 * -low / span
    body.append(line(zero, 0, height, css="grid"))
    base = height + rug + 15
    body.append(label(text.format_number(low), 0, base, css="tick"))
    body.append(label(text.format_number(high), 100, base, anchor="end", css="tick"))
    if 30 < zero < 70:
        body.append(label("0", zero, base, anchor="middle", css="tick"))
    described = f"from {low:.3g} to {high:.3g}; {len(set(plot.codebook))} codebook entries"
    title = f"weights of {plot.name}"
    return picture("".join(body), height=height + rug + 20, title=title, description=described, css="small")


def _stage_note(stages: Sequence[StageBytes], index: int) -> str:
    size, first = stages[index].bytes, stages[0].bytes
    if index == 0 or size <= 0 or first <= 0:
        return text.format_bytes(size)
    return f"{text.format_bytes(size)}  ·  {text.format_ratio(first / size)}"


def _log_height(ratio: float, scale_decades: int) -> float:
    """Return a height of 0 to 100; values below the scale keep a sliver, so that they are seen to be there."""
    if ratio <= 0:
        return 0.0
    return min(max(100 * (1 + math.log10(ratio) / scale_decades), 1.0), 100.0)


def _steps(levels: Sequence[float], first: int, last: int, *, css: str) -> str:
    """Return the shaded steps ``first`` to ``last`` of a curve of ``levels`` (0 to 100)."""
    if first >= last:
        return ""
    count = len(levels)
    stride = max(1, math.ceil(count / _MOST_STEPS))
    points = []
    for index in range(first, last, stride):
        right = 100 * min(index + stride, last) / count
        points.append(f"V{100 - levels[index]:.4g}H{right:.5g}")
    start, curve = 100 * first / count, "".join(points)
    edge = f'<path class="{css} edge" d="M{start:.5g} {100 - levels[first]:.4g}{curve}"/>'
    return f'<path class="{css} area" d="M{start:.5g} 100{curve}V100Z"/>{edge}'


def _stretched(body: str, top: float, height: float) -> str:
    """Return an inner picture whose 100 by 100 units fill the whole width and ``height`` pixels."""
    place = f'y="{top}" width="100%" height="{height}" viewBox="0 0 100 100" preserveAspectRatio="none"'
    return f"<svg {place}>{body}</svg>"


def _across(y: float, *, css: str) -> str:
    """Return a level line over the whole width."""
    return f'<line class="{css}" x1="0" x2="100%" y1="{y:.5g}" y2="{y:.5g}"/>'
