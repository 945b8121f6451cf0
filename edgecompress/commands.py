"""What each command does: read its arguments, call the library, print what came back."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgecompress.artifacts import is_container, open_artifact
from edgecompress.bundle.wheel import for_installed
from edgecompress.case import LARGE_MODEL_BYTES, Request
from edgecompress.console import note, progress_step, show, show_json
from edgecompress.data import check_shapes, for_validation, parse_shape
from edgecompress.device_commands import bench, bundle
from edgecompress.devices import BenchOptions
from edgecompress.errors import EdgecompressError, ModelError, UsageError
from edgecompress.evidence import accuracy_of, describe, outputs_of
from edgecompress.files import refuse_existing, shared_folder
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, default_shapes, find_layers
from edgecompress.model import payload_bytes, signature
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.pipeline import SELF_EXTRACTING_FILE
from edgecompress.pipeline import compress as run_compress
from edgecompress.plan import make_plan
from edgecompress.recipe import Recipe, read_recipe, with_overrides
from edgecompress.report import strict_json
from edgecompress.report.model import Report, from_json, to_json
from edgecompress.report.terminal import (
    inspect_table,
    layer_table,
    summary_table,
    validation_table,
)
from edgecompress.report.text import printable
from edgecompress.targets import load_target
from edgecompress.tensors import all_tensors, tensor_bytes
from edgecompress.validate import require, rows_of
from edgecompress.validate import validate as run_validate


def inspect(model: Path, *, shapes: Sequence[str], json: bool) -> None:
    """Print the layers of a model."""
    source = open_artifact(model)
    given = _shapes(shapes)
    check_shapes(given, signature(source.proto)[0])
    prepared, _ = run_pass(source, "prepare", prepare, None)
    graph = open_graph(prepared)
    entries = find_layers(graph, {**default_shapes(graph), **given})
    plan = make_plan(Recipe(), entries, model_sha256="", calibrated=False)
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in all_tensors(prepared.proto)}
    total = sum(sizes.values())
    rows = [
        {
            "name": entry.name,
            "op": entry.op,
            "shape": list(entry.shape),
            "parameters": entry.parameters,
            "macs": entry.macs if isinstance(entry, Layer) else None,
            "bytes_share": sizes.get(entry.name, 0) / total if total else 0.0,
            "skip_reason": decided.reason,
        }
        for entry, decided in zip(entries, plan.layers, strict=True)
    ]
    if json:
        show_json({"layers": rows})
    else:
        sides = zip(("input", "output"), signature(source.proto), strict=True)
        lines = [f"{side:<7}{printable(describe(spec))}" for side, specs in sides for spec in specs]
        show("\n".join(lines), inspect_table(rows))


def compress(
    model: Path,
    out: Path,
    *,
    settings: Mapping[str, Any],
    sources: Mapping[str, Path | None],
    shapes: Sequence[str],
    methods: Mapping[str, bool],
    threads: int,
    force: bool,
    json: bool,
) -> None:
    """Compress a model and print the summary, or the report as JSON."""
    given = [name for name, value in {"recipe": sources["recipe"], **settings}.items() if value is not None]
    if sources["plan"] is not None and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"--plan says everything already; it excludes {names}", hint="edit the plan, or leave it out")
    if is_container(model):
        raise ModelError(
            f"{model}: it is an .ecz file", hint="compress the original; 'edgecompress unpack' restores it"
        )
    recipe = read_recipe(sources["recipe"]) if sources["recipe"] is not None else Recipe()
    request = Request(
        recipe=with_overrides(recipe, _for_target(settings)),
        plan=sources["plan"],
        data=sources["data"],
        test_data=sources["test_data"],
        **methods,
        shapes=_shapes(shapes),
        force=force,
        command=shlex.join(["edgecompress", *sys.argv[1:]]),
        threads=threads,
        step=progress_step,
    )
    report = run_compress(model, out, request)
    if json:
        show_json(to_json(report))
    else:
        _show(report, out)
        if request.self_extracting:
            path = out / SELF_EXTRACTING_FILE
            note(f"self-extracting model: {path}, {path.stat().st_size:,} bytes")


def _for_target(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with what a target asks for in place of its name."""
    target = settings.get("target")
    alignment = None if target is None else load_target(target).rank_alignment
    return {name: value for name, value in settings.items() if name != "target"} | {"rank_alignment": alignment}


def _show(report: Report, out: Path) -> None:
    show(layer_table(report))
    show(summary_table(report))
    for warning in report.warnings:
        note(f"note: {warning}")
    note(f"report: {out / 'report.html'}")


def validate(
    original: Path, compressed: Path, *, data: Path, min_sqnr_db: float | None, max_drop: float | None, json: bool
) -> None:
    """Compare two models and print the result; a missed tolerance is raised after printing."""
    model = open_artifact(original)
    inputs, _ = signature(model.proto)
    low_memory = payload_bytes(model) > LARGE_MODEL_BYTES
    del model  # the weights are not needed here, only in the processes that run it
    test = rows_of(for_validation(data, inputs), inputs)
    with progress_step("validate") as progress:
        result = run_validate(original, compressed, test, low_memory=low_memory, progress=progress)
    accuracy, outputs = accuracy_of(result), outputs_of(result.comparison)
    if json:
        found = {name: strict_json.encode(difference) for name, difference in outputs.items()}
        show_json({"accuracy": strict_json.encode(accuracy), "outputs": found})
    else:
        show(validation_table(accuracy, outputs))
    require(result, min_sqnr_db=min_sqnr_db, max_drop=max_drop)


def pack(model: Path, out: Path, *, force: bool) -> None:
    """Store an ONNX file in a container."""
    from edgecompress.container import pack as run_pack

    with progress_step("pack") as progress:
        result = run_pack(model, out, force=force, progress=progress)
    ratio = result.original_bytes / result.stored_bytes
    note(f"{result.original_bytes:,} -> {result.stored_bytes:,} bytes (x{ratio:.2f}): {out}")


def unpack(container: Path, out: Path, *, force: bool) -> None:
    """Restore an ONNX file from a container."""
    from edgecompress.container import unpack as run_unpack

    for path in run_unpack(container, out, force=force):
        note(f"restored: {path}")


def export(factory: str, out: Path, *, inputs: Sequence[str], dynamic_batch: bool, force: bool) -> None:
    """Export a torch module."""
    from edgecompress.export import export_onnx

    shapes = [_dims(text) for text in inputs]
    export_onnx(factory, inputs=shapes, dynamic_batch=dynamic_batch, destination=out, force=force)
    note(f"exported: {out}")


def demo(out: Path) -> None:
    """Run the whole line on the model that ships with the tool."""
    digits = shared_folder("calibration") / "digits"
    model, folder = digits / "digits_cnn.onnx", out / "bundle"
    request = Request(
        data=digits,
        force=True,
        command=shlex.join(["edgecompress", "compress", str(model), "-o", str(out), "--data", str(digits)]),
        step=progress_step,
    )
    refuse_existing(out, force=_is_demo(out, model.stem))
    _show(run_compress(model, out, request), out)
    shutil.rmtree(folder / "lib", ignore_errors=True)  # of an earlier run, perhaps with another version of the runtime
    bundle(out, folder, target=for_installed(load_target("x86_64")), force=True)
    bench([folder], device="local", options=BenchOptions())
    note(f"\nThe report of it all: {(out / 'report.html').absolute()}")


def _is_demo(out: Path, name: str) -> bool:
    """Tell whether a folder holds an earlier demo, which may be replaced without asking."""
    try:
        return from_json((out / "report.json").read_text(encoding="utf-8")).model.name == name
    except (OSError, ValueError, EdgecompressError):
        return False


def _shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    return dict(parse_shape(text) for text in texts)


def _dims(text: str) -> tuple[int, ...]:
    try:
        return parse_shape(f"input={text}")[1]
    except UsageError:
        hint = "positive dimensions with commas: --input 1,3,32,32"
        raise UsageError(f"--input {text!r} is not a shape", hint=hint) from None
