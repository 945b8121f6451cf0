"""What each command does: read its arguments, call the library, print what came back."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from edgecompress.artifacts import artifact_bytes, open_artifact
from edgecompress.console import progress_step
from edgecompress.data import for_validation, parse_shape
from edgecompress.errors import UsageError
from edgecompress.evidence import accuracy_of, latency_of, outputs_of
from edgecompress.files import shared_folder
from edgecompress.graph import integer_limits, open_graph
from edgecompress.layers import Layer, default_shapes, find_layers
from edgecompress.model import payload_bytes, signature
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.pipeline import LARGE_MODEL_BYTES, Request
from edgecompress.pipeline import compress as run_compress
from edgecompress.plan import make_plan
from edgecompress.recipe import Recipe, Settings, read_recipe, with_overrides
from edgecompress.report import strict_json
from edgecompress.report.model import Report, to_json
from edgecompress.report.terminal import inspect_table, latency_table, layer_table, summary_table, validation_table
from edgecompress.validate import random_rows, require, rows_of, sample_feeds
from edgecompress.validate import validate as run_validate

_stderr = Console(stderr=True)


def inspect(model: Path, *, shapes: Sequence[str], json: bool) -> None:
    """Print the layers of a model."""
    prepared, _ = run_pass(open_artifact(model), "prepare", prepare, None)
    graph = open_graph(prepared)
    entries = find_layers(graph, {**default_shapes(graph), **_shapes(shapes)})
    plan = make_plan(Recipe(), entries, model_sha256="", calibrated=False)
    total = payload_bytes(prepared)
    rows = [
        {
            "name": entry.name,
            "op": entry.op,
            "shape": list(entry.shape),
            "parameters": entry.parameters,
            "macs": entry.macs if isinstance(entry, Layer) else None,
            "bytes_share": _bytes(entry) / total if total else 0.0,
            "skip_reason": decided.reason,
        }
        for entry, decided in zip(entries, plan.layers, strict=True)
    ]
    if json:
        _print_json({"layers": rows})
    else:
        Console().print(inspect_table(rows))


def _bytes(entry: Any) -> int:
    return int(entry.parameters * (entry.constant.dtype.itemsize if isinstance(entry, Layer) else 4))


def compress(
    model: Path,
    out: Path,
    *,
    settings: Mapping[str, Any],
    sources: Mapping[str, Path | None],
    shapes: Sequence[str],
    calibrate: bool,
    threads: int,
    force: bool,
    json: bool,
) -> None:
    """Compress a model and print the summary, or the report as JSON."""
    given = [name for name, value in settings.items() if value is not None]
    if sources["plan"] is not None and (given or sources["recipe"] is not None):
        names = ", ".join(f"--{name}" for name in [*(["recipe"] if sources["recipe"] else []), *given])
        raise UsageError(f"--plan says everything already; it excludes {names}", hint="edit the plan, or leave --plan out")
    recipe = read_recipe(sources["recipe"]) if sources["recipe"] is not None else Recipe()
    request = Request(
        recipe=with_overrides(recipe, Settings(**settings)),
        plan=sources["plan"],
        data=sources["data"],
        test_data=sources["test_data"],
        calibrate=calibrate,
        shapes=_shapes(shapes),
        force=force,
        command=shlex.join(["edgecompress", *sys.argv[1:]]),
        threads=threads,
        step=progress_step,
    )
    report = run_compress(model, out, request)
    _show(report, out, json=json)


def _show(report: Report, out: Path, *, json: bool) -> None:
    if json:
        sys.stdout.write(to_json(report))
        return
    _stderr.print(layer_table(report))
    _stderr.print(summary_table(report))
    for warning in report.warnings:
        _stderr.print(f"note: {warning}", style="yellow", highlight=False)
    _stderr.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)


def validate(
    original: Path, compressed: Path, *, data: Path, min_sqnr_db: float | None, max_drop: float | None, json: bool
) -> None:
    """Compare two models and print the result; a missed tolerance is raised after printing."""
    model = open_artifact(original)
    open_artifact(compressed)
    inputs, _ = signature(model.proto)
    test = rows_of(for_validation(data, inputs), inputs)
    with progress_step("validate") as progress:
        result = run_validate(
            original, compressed, test, low_memory=payload_bytes(model) > LARGE_MODEL_BYTES, progress=progress
        )
    accuracy, outputs = accuracy_of(result), outputs_of(result.comparison)
    if json:
        found = {name: strict_json.encode(difference) for name, difference in outputs.items()}
        _print_json({"accuracy": strict_json.encode(accuracy), "outputs": found})
    else:
        Console().print(validation_table(accuracy, outputs))
    require(result, min_sqnr_db=min_sqnr_db, max_drop=max_drop)


def pack(model: Path, out: Path, *, force: bool) -> None:
    """Store an ONNX file in a container."""
    from edgecompress.container import pack as run_pack

    with progress_step("pack") as progress:
        result = run_pack(model, out, force=force, progress=progress)
    ratio = result.original_bytes / result.stored_bytes
    _stderr.print(f"{result.original_bytes:,} -> {result.stored_bytes:,} bytes (x{ratio:.2f}): {out}", highlight=False, soft_wrap=True)


def unpack(container: Path, out: Path, *, force: bool) -> None:
    """Restore an ONNX file from a container."""
    from edgecompress.container import unpack as run_unpack

    run_unpack(container, out, force=force)
    _stderr.print(f"restored: {out}", highlight=False, soft_wrap=True)


def bundle(source: Path, out: Path, *, target: str, force: bool, json: bool) -> None:
    """Build a bundle and print its size table."""
    from edgecompress.bundle import build_bundle
    from edgecompress.targets import load_target

    wanted = load_target(target)
    summary = build_bundle(source, out, target=wanted, sample=_bundle_sample(source), force=force)
    sizes = {name: {"installed_bytes": row.installed_bytes, "download_bytes": row.download_bytes} for name, row in summary.sizes.items()}
    if json:
        _print_json({"bundle": str(out), "target": wanted.name, "sizes": sizes})
    else:
        _stderr.print(_size_table(sizes))
        _stderr.print(f"bundle: {out}   (run it: python3 -I {out / 'run.py'})", highlight=False, soft_wrap=True)


def _bundle_sample(source: Path) -> dict[str, Any]:
    file = source / "model.onnx" if source.is_dir() and (source / "model.onnx").is_file() else source
    return _random_sample(file, {})


def _random_sample(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return one run's random inputs for a model file of any kind."""
    model = open_artifact(path)
    inputs, _ = signature(model.proto)
    rows = random_rows(inputs, integer_limits(open_graph(model)), shapes, rows=1)
    return sample_feeds(rows, inputs, shapes)


def _size_table(sizes: Mapping[str, Mapping[str, int]]) -> Any:
    from rich.table import Table

    table = Table("part", "installed", "download", box=None)
    for name, row in sizes.items():
        table.add_row(name, f"{row['installed_bytes']:,}", f"{row['download_bytes']:,}")
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def verify_bundle(folder: Path, *, json: bool) -> None:
    """Check a bundle against its manifest."""
    from edgecompress.bundle import verify_bundle as run_verify

    manifest = run_verify(folder)
    if json:
        _print_json({"bundle": str(folder), "target": manifest.target, "files": len(manifest.files), "ok": True})
    else:
        _stderr.print(f"ok: {len(manifest.files)} files, target {manifest.target}", highlight=False)


def bench(
    model: Path, *, device: str, against: Path | None, threads: int, runs: int, shapes: Sequence[str], json: bool
) -> None:
    """Measure one model, or two in alternating runs, and print the figures."""
    from edgecompress.bundle import verify_bundle as run_verify
    from edgecompress.devices import open_runner

    runner = open_runner(device)
    is_bundle = (model / "manifest.json").is_file()
    if is_bundle:
        run_verify(model)
    with progress_step("measure") as progress:
        if is_bundle and against is None:
            original, compressed = None, runner.measure_bundle(model, threads=threads, runs=runs)
        else:
            feeds = _random_sample(model if against is None else against, _shapes(shapes))
            paths = [model] if against is None else [against, model]
            samples = runner.measure(paths, feeds=feeds, threads=threads, runs=runs, progress=progress)
            original, compressed = (None if against is None else samples[0]), samples[-1]
    latency = latency_of(original, compressed, device=device, threads=threads)
    sizes = {"model_bytes": artifact_bytes(model), "against_bytes": None if against is None else artifact_bytes(against)}
    if json:
        _print_json({"latency": strict_json.encode(latency), "size": sizes, "facts": dict(compressed.metadata)})
    else:
        Console().print(latency_table(latency))


def export(factory: str, out: Path, *, inputs: Sequence[str], dynamic_batch: bool, force: bool) -> None:
    """Export a torch module."""
    from edgecompress.export import export_onnx

    shapes = [parse_shape(f"input={text}")[1] for text in inputs]
    export_onnx(factory, inputs=shapes, dynamic_batch=dynamic_batch, destination=out, force=force)
    _stderr.print(f"exported: {out}", highlight=False, soft_wrap=True)


def demo(out: Path) -> None:
    """Run the whole line on the model that ships with the tool."""
    digits = shared_folder("calibration") / "digits"
    request = Request(
        recipe=Recipe(everywhere=Settings(factorize="none", cluster="kmeans", bits=5)),
        data=digits,
        force=True,
        command=f"edgecompress compress {digits / 'digits_cnn.onnx'} -o {out} --data {digits}",
        step=progress_step,
    )
    report = run_compress(digits / "digits_cnn.onnx", out, request)
    _show(report, out, json=False)
    bundle(out, out / "bundle", target="x86_64", force=True, json=False)
    bench(out / "bundle", device="local", against=None, threads=1, runs=50, shapes=[], json=False)
    _stderr.print(f"\nThe report of it all: {(out / 'report.html').absolute()}", highlight=False, soft_wrap=True)


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return dict(parse_shape(text) for text in texts)


def _print_json(value: Any) -> None:
    sys.stdout.write(json_module.dumps(value, indent=2, allow_nan=False) + "\n")
