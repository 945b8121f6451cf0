"""The layer table of the page: one row a layer in graph order, with bars for its share of parameters and of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgecompress.report import text
from edgecompress.report.model import UNTOUCHED
from edgecompress.report.svg import escape, inline_bar, name_markup

if TYPE_CHECKING:
    from edgecompress.report.model import LayerRow, Report

_HEAD = (
    ("", "layer"),
    ("", "what it got"),
    ("n", "parameters"),
    ("n", "stored"),
    ("n", "bits/param."),
    ("n", "weights, dB"),
    ("n", "output, dB"),
)


def layer_section(report: Report) -> str:
    """Return the section on layers; a sentence where none was found."""
    rows = report.layers
    if not rows:
        return '<section><h2>Layers</h2><p class="lead">No layer with constant weights was found.</p></section>'
    touched = sum(row.scheme != UNTOUCHED for row in rows)
    lead = (
        f"{touched} of {len(rows)} layers compressed, in the model's order. Bars share one scale down each column: "
        "pale is what there was, dark what is left. The last two columns are signal-to-noise ratios; higher is closer "
        "to the original."
    )
    heads = "".join(f'<th class="{css}" scope="col">{name}</th>' for css, name in _HEAD)
    body = "".join(_row(row, report) for row in rows)
    table = f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody><tfoot>{_total(report)}</tfoot>"
    return f'<section><h2>Layers</h2><p class="lead">{lead}</p><table class="layers">{table}</table></section>'


def _row(row: LayerRow, report: Report) -> str:
    untouched = row.scheme == UNTOUCHED
    details = " · ".join(filter(None, (row.op + " " + text.format_shape(row.shape), _macs(row))))
    scheme = "left alone" if untouched else escape(row.scheme)
    reason = f"<small>{escape(row.reason)}</small>" if row.reason else ""
    most = max(max(other.parameters_before, other.parameters_after) for other in report.layers)
    cells = (
        f'<th scope="row" data-v="{escape(row.name)}">{name_markup(row.name)}<small>{escape(details)}</small></th>',
        f'<td class="got" data-v="{escape(row.scheme)}">{scheme}{reason}</td>',
        _cell("parameters", row.parameters_after, _parameters(row), bar=_bar(row, most), wide="two"),
        _stored_cell(row, report),
        _number("bits/param.", text.bits_per_parameter(row.stored_bytes, row.parameters_before)),
        _number("weights, dB", row.weight_sqnr_db),
        _number("output, dB", row.output_sqnr_db),
    )
    return f'<tr class="{"untouched" if untouched else ""}">{"".join(cells)}</tr>'


def _stored_cell(row: LayerRow, report: Report) -> str:
    most = max((other.stored_bytes or 0 for other in report.layers), default=0)
    if row.stored_bytes is None:
        return _cell("stored", None, text.UNKNOWN, bar=inline_bar(0, 0, 1), wide="one")
    share = text.format_share(row.stored_bytes, report.size.ecz_bytes)
    words = f'<span title="{share} of the file">{text.format_bytes(row.stored_bytes)}</span>'
    return _cell("stored", row.stored_bytes, words, bar=inline_bar(row.stored_bytes, 0, most), wide="one")


def _total(report: Report) -> str:
    """Return the sums below the table, and what of the file is in no row."""
    rows, size = report.layers, report.size
    before, after = (sum(getattr(row, name) for row in rows) for name in ("parameters_before", "parameters_after"))
    parameters = text.format_integer(before) + (f" → {text.format_integer(after)}" if after != before else "")
    stored = sum(row.stored_bytes or 0 for row in rows)
    unknown = any(row.stored_bytes is None for row in rows)
    blank, empty = inline_bar(0, 0, 1), '<td class="n"></td>'
    total = (
        '<th scope="row">all layers</th><td class="got"></td>',
        _cell("parameters", None, parameters, bar=blank, wide="two"),
        _cell("stored", None, text.format_bytes(stored), bar=blank, wide="one"),
        empty if unknown else _number("bits/param.", text.bits_per_parameter(stored, before)),
        empty * 2,
    )
    words = "the rest: graph, biases, tables" + (", layers without a size above" if unknown else "")
    left = _cell("stored", None, text.format_bytes(max(size.ecz_bytes - stored, 0)), bar=blank, wide="one")
    rest = f'<th scope="row">{words}</th><td class="got"></td>{empty}{left}{empty * 3}'
    return f"<tr>{''.join(total)}</tr><tr>{rest}</tr>"


def _macs(row: LayerRow) -> str:
    """Return the layer's multiplications, and what is left of them where that changed."""
    if row.macs_before is None:
        return ""
    words = text.format_count(row.macs_before)
    if row.macs_after is not None and row.macs_after != row.macs_before:
        words += f" → {text.format_count(row.macs_after)}"
    return f"{words} MACs"


def _parameters(row: LayerRow) -> str:
    words = text.format_integer(row.parameters_before)
    return (
        words
        if row.parameters_after == row.parameters_before
        else f"{words} → {text.format_integer(row.parameters_after)}"
    )


def _bar(row: LayerRow, most: int) -> str:
    return inline_bar(row.parameters_after, row.parameters_before, most)


def _cell(name: str, value: float | None, words: str, *, bar: str, wide: str) -> str:
    """Return a cell with a bar and a number; ``value`` is what it sorts by."""
    key = "" if value is None else f"{value:.10g}"
    start = f'<td class="n wide" data-label="{name}" data-v="{key}">'
    return f'{start}<div><span class="v {wide}">{words}</span>{bar}</div></td>'


def _number(name: str, value: float | None) -> str:
    words = text.UNKNOWN if value is None else f"{value:.1f}".replace("-", text.MINUS)
    key = "" if value is None else f"{value:.10g}"
    return f'<td class="n" data-label="{name}" data-v="{key}">{words}</td>'
