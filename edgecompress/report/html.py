"""The report as one self-contained page: no request to anywhere, readable without script, in light, dark and print."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from edgecompress.report import svg, svg_latency, text
from edgecompress.report.html_layers import layer_section
from edgecompress.report.svg import escape

if TYPE_CHECKING:
    from edgecompress.report.model import Accuracy, Latency, LatencySummary, LayerPlot, Report


def to_html(report: Report) -> str:
    """Return the page as text, to be written as UTF-8; the same report gives the same bytes.

    A content security policy in it allows its own style and script (by hash) and nothing else.
    """
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<title>{escape(report.model.name)}, compressed</title><link rel="icon" href="data:,"><style>{style}</style>'
    )
    sections = (
        _header(report),
        _size_section(report),
        layer_section(report),
        _spectrum_section(report.plots),
        _histogram_section(report.plots),
        _latency_section(report.latency),
        _output_section(report),
        _repeat_section(report),
    )
    body = "\n".join(filter(None, sections))
    page = f"<body>\n<main>\n{body}\n</main>\n<script>{script}</script></body>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{page}</html>\n'


def _source(content: str) -> str:
    """Return the hash by which a content security policy allows one inline style or script."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _header(report: Report) -> str:
    figures = _size_figure(report), _accuracy_figure(report), _latency_figure(report.latency)
    warnings = [*report.warnings, *(report.latency.warnings if report.latency else ())]
    notes = "".join(f"<li>{escape(words)}</li>" for words in warnings)
    warned = f'<section class="warnings"><h2>Read with care</h2><ul>{notes}</ul></section>' if warnings else ""
    return (
        f'<header><p class="kicker">edgecompress report</p><h1>{escape(report.model.name)}</h1>'
        f'<dl class="headline">{"".join(figures)}</dl></header>{warned}'
    )


def _figure(name: str, number: str, unit: str, picture: str, note: str) -> str:
    """Return one of the three figures that head the page; ``picture`` and ``note`` are markup, the others text."""
    picture = picture or '<div class="mini empty"></div>'
    figure = f"{escape(number)} <span>{escape(unit)}</span>" if unit else escape(number)
    return (
        f'<div><dt>{escape(name)}</dt><dd><div class="figure">{figure}</div>{picture}'
        f'<div class="note">{note}</div></dd></div>'
    )


def _size_figure(report: Report) -> str:
    size = report.size
    original, stored = text.format_bytes(size.original_bytes), text.format_bytes(size.ecz_bytes)
    number, _, unit = text.format_size_change(size.compression_ratio).partition(" ")
    picture = svg.pair_of_bars(size.original_bytes, size.ecz_bytes, f"{original} above {stored}")
    return _figure("Size", number, unit, picture, f"{original} → <b>{stored}</b>, weights and graph")


def _accuracy_figure(report: Report) -> str:
    accuracy = report.accuracy
    if accuracy is None or (accuracy.drop_points is None and accuracy.agreement is None):
        return _figure("Accuracy", text.UNKNOWN, "", "", "not measured: no data set was given")
    where = escape(accuracy.data)
    if accuracy.drop_points is None or accuracy.metric == "agreement":
        note = f"the same decision on {text.format_integer(accuracy.samples)} samples<br>{where}"
        bar = svg.share_bar(accuracy.agreement or 0.0)
        return _figure("Agreement", text.format_metric(accuracy.agreement), "", bar, note)
    percent, error = text.is_percent(accuracy), accuracy.standard_error_points
    unit = "points" if percent else accuracy.metric
    if error is not None:
        unit = f"± {text.format_number(error)} {unit}"
    number = text.format_change(accuracy.drop_points, percent=percent)
    values = [text.format_metric(value, percent=percent) for value in (accuracy.original, accuracy.compressed)]
    picture = "" if error is None else svg.interval(accuracy.drop_points, error)
    note = f"{values[0]} → <b>{values[1]}</b>{_doubt(accuracy)}<br>{where}"
    return _figure(f"Accuracy, {accuracy.metric}", number, unit, picture, note)


def _doubt(accuracy: Accuracy) -> str:
    """Return what the paired standard error says about the drop, to stand behind the two values."""
    drop, error = accuracy.drop_points, accuracy.standard_error_points
    if drop is None or error is None or error <= 0:
        return ""
    return ", within two standard errors of no change" if abs(drop) <= 2 * error else ""


def _latency_figure(latency: Latency | None) -> str:
    if latency is None or latency.compressed is None:
        return _figure("Latency", text.UNKNOWN, "", "", "not measured")
    compressed = text.format_ms(latency.compressed.median_ms)
    where = f"{escape(latency.device)}, {_threads(latency.threads)}"
    if latency.original is None or latency.ratio is None:
        return _figure("Latency", compressed, "", "", f"median, {where}")
    original = text.format_ms(latency.original.median_ms)
    picture = svg.pair_of_bars(
        latency.original.median_ms, latency.compressed.median_ms, f"{original} above {compressed}"
    )
    note = f"{original} → <b>{compressed}</b>, median on {where}"
    return _figure("Latency", text.format_ratio(latency.ratio), "of the original", picture, note)


def _size_section(report: Report) -> str:
    if not report.size.waterfall:
        return ""
    size = report.size
    lead = (
        "The whole model after each stage; pale is what that stage took away. "
        f"As <code>model.onnx</code> it has {text.format_bytes(size.onnx_bytes)}, "
        f"as <code>model.ecz</code> {text.format_bytes(size.ecz_bytes)}."
    )
    return _section("Where the bytes went", lead, svg.waterfall(size.waterfall))


def _spectrum_section(plots: tuple[LayerPlot, ...]) -> str:
    drawn = [plot for plot in plots if plot.singular_values]
    if not drawn:
        return ""
    power = svg.decades(drawn)
    figures = [(plot, _energy(plot), svg.spectrum(plot, power)) for plot in drawn]
    lead = (
        "Singular values, largest first, relative to the largest, all on one logarithmic scale. "
        "A layer whose values fall early can be written with few of them; shaded ones were kept."
    )
    return _section("Spectra of the biggest layers", lead, _multiples(figures))


def _energy(plot: LayerPlot) -> str:
    """Return which values were kept and the share of the sum of squares that they hold."""
    values = plot.singular_values
    if plot.rank is None:
        return f"all {len(values)} kept"
    whole = sum(value * value for value in values)
    kept = sum(value * value for value in values[: max(plot.rank, 0)])
    return f"{plot.rank} of {len(values)}, {text.format_share(kept, whole)} of the energy"


def _histogram_section(plots: tuple[LayerPlot, ...]) -> str:
    drawn = [plot for plot in plots if plot.histogram_counts and len(plot.histogram_edges) > 1]
    if not drawn:
        return ""
    figures = [(plot, _entries(plot), svg.histogram(plot)) for plot in drawn]
    lead = "How often each value occurs in the original, and below it the few values that the compressed weights take."
    return _section("Weights of the biggest layers", lead, _multiples(figures))


def _entries(plot: LayerPlot) -> str:
    count = len(set(plot.codebook))
    return f"{count} values" if count else "left as they are"


def _multiples(figures: list[tuple[LayerPlot, str, str]]) -> str:
    """Return small charts side by side, each with its layer's name and a note above it."""
    body = "".join(
        f"<figure><figcaption>{svg.name_markup(plot.name)}<span>{escape(note)}</span></figcaption>{chart}</figure>"
        for plot, note, chart in figures
    )
    return f'<div class="multiples">{body}</div>'


def _latency_section(latency: Latency | None) -> str:
    if latency is None:
        return ""
    both = (("original", latency.original), ("compressed", latency.compressed))
    models = [(name, summary) for name, summary in both if summary is not None]
    if not models:
        return ""
    stride = max(svg_latency.dots_per_run(len(summary.values_ms)) for _, summary in models)
    dot = "one run" if stride == 1 else f"{stride} runs"
    lead = (
        f"Milliseconds on {escape(latency.device)}, {_threads(latency.threads)}. A dot is {dot}, the line the median, "
        "the tick the 90th percentile."
    )
    heads = "".join(
        f'<th class="n" scope="col">{name}</th>'
        for name in ("start", "first run", "median", "p90", "runs", "peak memory")
    )
    body = "".join(_latency_row(name, summary) for name, summary in models)
    table = f'<thead><tr><th scope="col">model</th>{heads}</tr></thead><tbody>{body}</tbody>'
    return _section("Latency", lead, f'{svg_latency.strips(models)}<div class="scroll"><table>{table}</table></div>')


def _latency_row(name: str, summary: LatencySummary) -> str:
    times = (summary.init_ms, summary.first_ms, summary.median_ms, summary.p90_ms)
    words = [text.format_ms(value) for value in times]
    words += [text.format_integer(summary.samples), text.format_bytes(summary.peak_rss_bytes)]
    return f'<tr><th scope="row">{name}</th>{"".join(f"""<td class="n">{word}</td>""" for word in words)}</tr>'


def _output_section(report: Report) -> str:
    if not report.outputs:
        return ""
    rows = []
    for name, difference in report.outputs.items():
        words = (text.format_sqnr(difference), text.format_number(difference.max_abs))
        cells = "".join(f'<td class="n">{word}</td>' for word in words)
        rows.append(f'<tr><th scope="row">{svg.name_markup(name)}</th>{cells}</tr>')
    columns = ("signal to noise", "largest difference")
    heads = '<th scope="col">output</th>' + "".join(f'<th class="n" scope="col">{name}</th>' for name in columns)
    agreement = report.accuracy.agreement if report.accuracy else None
    lead = "How far the outputs moved, on the same inputs."
    if agreement is not None:
        lead += f" Both models decide alike on {text.format_metric(agreement)} of them."
    table = f'<table class="narrow"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return _section("Outputs", lead, f'<div class="scroll">{table}</div>')


def _repeat_section(report: Report) -> str:
    model, tool = report.model, report.tool
    facts = [
        ("recipe", f"<code>{escape(tool.recipe_hash)}</code>"),
        ("model", f"<code>{escape(model.sha256)}</code> (SHA-256), opset {model.opset}"),
        ("inputs", _lines(model.inputs)),
        ("outputs", _lines(model.outputs)),
        ("versions", escape(", ".join(f"{name} {version}" for name, version in tool.versions.items()))),
    ]
    body = "".join(f"<dt>{name}</dt><dd>{words}</dd>" for name, words in facts if words)
    lead = "The same model, data and versions give the same model, byte for byte."
    return _section("Do it again", lead, f'<pre><code>{escape(tool.command)}</code></pre><dl class="facts">{body}</dl>')


def _section(title: str, lead: str, body: str) -> str:
    """Return a section; ``lead`` and ``body`` are markup."""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{lead}</p>{body}</section>'


def _lines(items: tuple[str, ...]) -> str:
    return "<br>".join(f"<code>{escape(item)}</code>" for item in items)


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")
