"""Tables for a terminal. They are built here and printed by the command line; nothing in a name can act as markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from edgecompress.report import text
from edgecompress.report.model import UNTOUCHED

if TYPE_CHECKING:
    from edgecompress.bundle.ort import Usability
    from edgecompress.costs import KernelCost
    from edgecompress.report.model import Accuracy, Latency, LayerRow, OutputDifference, Report
    from edgecompress.runtime_build import Operators
    from edgecompress.targets import Target

_NAME_LIMIT = 48
_LEAST = 8  # letters a line of a column that folds; below, it would vanish in favour of those that do not


def summary_table(report: Report) -> Table:
    """Return what matters of a compression: size, accuracy with its error (else the outputs' difference), latency."""
    table = _table(report.model.name, ("", "original", "compressed", ""))
    size = report.size
    smaller = text.format_size_change(size.compression_ratio)
    _row(table, "size", text.format_bytes(size.original_bytes), text.format_bytes(size.ecz_bytes), smaller)
    _row(table, "as ONNX", text.format_bytes(size.original_bytes), text.format_bytes(size.onnx_bytes), "")
    if report.accuracy is not None:
        _add_accuracy(table, report.accuracy)
    if report.accuracy is None or report.accuracy.drop_points is None:
        _add_outputs(table, report.outputs)
    if report.latency is not None:
        _add_latency(table, report.latency)
    if report.layers:
        touched = sum(row.scheme != UNTOUCHED for row in report.layers)
        _row(table, "layers", str(len(report.layers)), f"{touched} compressed", "")
    return table


def layer_table(report: Report) -> Table:
    """Return one row a layer, in graph order: what it got or why it got nothing, and what that cost."""
    names = ("layer", "op", "scheme", "parameters", "stored", "bits", "SQNR")
    table = _table(
        "layers (stored: bytes in model.ecz, bits: per parameter, SQNR: of the output)", names, left=3, folds=(0, 2)
    )
    for row in report.layers:
        _row(table, *_layer_cells(row), style="dim" if row.scheme == UNTOUCHED else "")
    return table


def inspect_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of ``inspect``; each has the keys of ``inspect --json``, ``bytes_share`` between 0 and 1."""
    table = _table(
        "layers", ("layer", "op", "shape", "parameters", "MACs", "bytes", "left alone because"), left=2, folds=(0, 6)
    )
    table.columns[-1].justify = "left"
    for row in rows:
        cells = (
            text.shorten(row["name"], _NAME_LIMIT),
            row["op"],
            text.format_shape(row["shape"] or ()),
            text.format_integer(row["parameters"]),
            text.format_count(row["macs"]),
            text.format_share(row["bytes_share"] or 0.0, 1.0),
            row["skip_reason"] or "",
        )
        _row(table, *cells, style="dim" if row["skip_reason"] else "")
    return table


def validation_table(accuracy: Accuracy | None, outputs: Mapping[str, OutputDifference]) -> Table:
    """Return the result of ``validate``: the metric of both models, and how far each output moved."""
    table = _table("validation", ("", "original", "compressed", ""))
    if accuracy is not None:
        _add_accuracy(table, accuracy)
    _add_outputs(table, outputs)
    return table


def bench_table(rows: Sequence[Mapping[str, Any]], *, device: str, threads: int) -> Table:
    """Return the rows of ``bench``: one a model, each with the keys of ``bench --json``, times in milliseconds."""
    emulated = any(row["emulated"] for row in rows)
    what = "instructions" if emulated else "latency in ms"
    runs = text.format_integer(rows[0]["samples"])
    headers = ("model", "start", "first", "median", "p90", "ratio", "memory", "outputs")
    title = f"{what} on {device}, {_threads(threads)}, {runs} runs"
    table = _table(title, (*headers, *(("instructions",) if emulated else ())), folds=(0,))
    for row in rows:
        cells = (
            text.shorten(row["model"], _NAME_LIMIT),
            *(text.format_ms(row[key]).removesuffix(" ms") for key in ("init_ms", "first_ms", "median_ms", "p90_ms")),
            text.format_ratio(row["ratio"]),
            text.format_bytes(row["peak_rss_bytes"]),
            "right" if row["outputs_match"] else text.UNKNOWN,  # wrong ones have ended the measurement
        )
        _row(table, *cells, *((text.format_count(row["instructions"]),) if emulated else ()))
    return table


def bundle_table(sizes: Mapping[str, Mapping[str, int]]) -> Table:
    """Return what each part of a bundle takes on disk and in a download; each has the keys of ``bundle --json``."""
    table = _table("bundle", ("part", "installed", "download"))
    for name, row in sizes.items():
        _row(table, name, *(text.format_bytes(row[key]) for key in ("installed_bytes", "download_bytes")))
    return table


def target_table(targets: Sequence[Target]) -> Table:
    """Return one row for each target that bundles can be built for: what it is, what runs there and how."""
    table = _table("targets", ("target", "machine", "runtime", "model", "runs with", "device"), left=6)
    for target in targets:
        runtime, providers = (
            target.runtime,
            [name.removesuffix("ExecutionProvider") for name in target.runtime.providers],
        )
        threads = f"{target.threads} thread{'s' if target.threads > 1 else ''}"
        _row(
            table,
            target.name,
            f"{target.system} {target.architecture}".removesuffix(" universal"),
            f"{runtime.package.split(':')[-1]} {runtime.version} ({', '.join(target.forms[:-1])})",
            target.model_form.replace("_", "-"),
            f"{', '.join(providers)}, {threads}, ranks in {target.rank_alignment}s",
            target.default_device,
        )
    return table


def operator_table(operators: Sequence[Operators]) -> Table:
    """Return the operators that a runtime for one model has to have."""
    table = _table("operators", ("domain", "opset", "names"), left=3, folds=(2,))
    for entry in operators:
        _row(table, entry.domain, str(entry.opset), ", ".join(entry.names))
    return table


def profile_table(costs: Sequence[KernelCost]) -> Table:
    """Return one row for each kernel of a model, dearest first: its tensors, how often it runs, what it takes."""
    table = _table("kernels", ("operator", "type", "shapes", "times", "each", "all", "share"), left=3, folds=(2,))
    total = sum(cost.each_ms * cost.kernel.count for cost in costs)
    for cost in costs:
        kernel, all_ms = cost.kernel, cost.each_ms * cost.kernel.count
        shapes = " ".join("x".join(map(str, shape)) for shape in kernel.shapes if len(shape) > 1)
        share = f"{all_ms / total:.0%}" if total else "-"
        cells = (kernel.op, "/".join(kernel.types), shapes, str(kernel.count))
        _row(table, *cells, f"{cost.each_ms * 1000:.1f} us", f"{all_ms:.3f} ms", share)
    return table


def usability_table(rows: Sequence[Usability]) -> Table:
    """Return one row for each accelerator: how many of the nodes it takes, in how many pieces, and what it does not."""
    headers = ("accelerator", "worth a try", "not taken", "nodes", "pieces")
    table = _table("accelerators", headers, left=3, folds=(2,))
    for row in rows:
        name = row.accelerator + (" (shapes fixed)" if row.shapes_fixed else "")
        _row(
            table,
            name,
            row.verdict,
            ", ".join(row.unsupported) or "-",
            f"{row.supported}/{row.nodes}",
            str(row.partitions),
        )
    return table


def _table(title: str, headers: Sequence[str], *, left: int = 1, folds: Sequence[int] = ()) -> Table:
    """Return an empty table whose first ``left`` columns are aligned left, the others right.

    On a narrow terminal the columns ``folds`` (all, where none is given) go on in the next line, the others stay whole.
    """
    table = Table(
        title=Text(text.printable(title)), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, header in enumerate(headers):
        whole = bool(folds) and index not in folds
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(
            Text(header), justify=justify, overflow="fold", no_wrap=whole, min_width=_LEAST if index in folds else None
        )
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of plain text: neither rich's markup nor control characters of a hostile name have any effect."""
    table.add_row(*(Text(text.printable(cell)) for cell in cells), style=style)


def _add_accuracy(table: Table, accuracy: Accuracy) -> None:
    percent = text.is_percent(accuracy)
    note = ""
    if accuracy.drop_points is not None:
        note = text.format_change(accuracy.drop_points, percent=percent) + (" points" if percent else "")
        if accuracy.standard_error_points is not None:
            note += f" ± {text.format_number(accuracy.standard_error_points)}"
    if accuracy.original is not None or accuracy.compressed is not None:
        values = (text.format_metric(value, percent=percent) for value in (accuracy.original, accuracy.compressed))
        _row(table, accuracy.metric, *values, note)
    samples = f"on {text.format_integer(accuracy.samples)}"
    if accuracy.agreement is not None:
        _row(table, "same decision", "", text.format_metric(accuracy.agreement), samples)


def _add_outputs(table: Table, outputs: Mapping[str, OutputDifference]) -> None:
    for name, difference in outputs.items():
        largest = f"max diff {text.format_number(difference.max_abs)}"
        _row(table, f"output {text.shorten(name, _NAME_LIMIT)}", "", text.format_sqnr(difference), largest)


def _add_latency(table: Table, latency: Latency) -> None:
    medians = (
        text.format_ms(None if summary is None else summary.median_ms)
        for summary in (latency.original, latency.compressed)
    )
    ratio = "" if latency.ratio is None else text.format_ratio(latency.ratio)
    _row(table, f"latency ({latency.device}, {_threads(latency.threads)})", *medians, ratio)


def _layer_cells(row: LayerRow) -> tuple[str, ...]:
    parameters = text.format_integer(row.parameters_before)
    if row.parameters_after != row.parameters_before:
        parameters += f" → {text.format_integer(row.parameters_after)}"
    bits = text.bits_per_parameter(row.stored_bytes, row.parameters_before)
    scheme = "left alone" if row.scheme == UNTOUCHED else row.scheme
    if row.reason:
        scheme += f" ({row.reason})"
    return (
        text.shorten(row.name, _NAME_LIMIT),
        row.op,
        scheme,
        parameters,
        text.format_bytes(row.stored_bytes),
        text.UNKNOWN if bits is None else f"{bits:.1f}",
        text.format_db(row.output_sqnr_db),
    )


def _threads(count: int) -> str:
    return f"{count} thread" + ("" if count == 1 else "s")
