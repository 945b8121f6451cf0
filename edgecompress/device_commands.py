"""What the commands about targets, bundles and devices do: read their arguments, call the library, print."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgecompress.artifacts import artifact_bytes, open_artifact
from edgecompress.bundle import BundleSummary, archive_path, build_archive, build_bundle, verify_archive
from edgecompress.bundle import verify_bundle as run_verify
from edgecompress.bundle.archive import SUFFIXES
from edgecompress.bundle.launch import runs_here
from edgecompress.bundle.manifest import README
from edgecompress.bundle.model_files import as_onnx, find_model
from edgecompress.bundle.ort import CONFIG
from edgecompress.bundle.program import MANIFEST
from edgecompress.case import LARGE_MODEL_BYTES
from edgecompress.console import note, progress_step, show, show_json
from edgecompress.costs import profile_model
from edgecompress.data import batches, for_validation, parse_shape
from edgecompress.devices import BenchOptions, open_runner
from edgecompress.devices.browser import serve
from edgecompress.errors import UsageError
from edgecompress.files import refuse_existing
from edgecompress.latency import machine_warnings
from edgecompress.model import Array, Model, payload_bytes, signature
from edgecompress.report.bench import bench_rows, device_facts, device_line
from edgecompress.report.profile import profile_facts, profile_line
from edgecompress.report.terminal import (
    bench_table,
    bundle_table,
    operator_table,
    profile_table,
    target_table,
    usability_table,
)
from edgecompress.runtime_build import build_command, build_runtime, runtime_needs
from edgecompress.targets import Target, list_targets, load_target
from edgecompress.validate import random_sample

if TYPE_CHECKING:
    from edgecompress.latency import LatencySamples
    from edgecompress.model import Model, TensorSpec


def targets(*, json: bool) -> None:
    """Print what bundles can be built for."""
    found = [load_target(name) for name in list_targets()]
    if json:
        show_json({"targets": [dataclasses.asdict(target) for target in found]})
    else:
        show(target_table(found))


class BundleForm(NamedTuple):
    """What a bundle is to be: the form of its runtime (None: the target's), a file of it that is given, one file."""

    runtime: str | None = None
    runtime_file: Path | None = None
    archive: bool = False


def bundle(
    source: Path,
    out: Path,
    *,
    target: str | Target,
    form: BundleForm | None = None,
    data: Path | None = None,
    shapes: Sequence[str] = (),
    force: bool = False,
    json: bool = False,
) -> None:
    """Build a bundle and print its size table."""
    form = form or BundleForm()
    wanted = target if isinstance(target, Target) else load_target(target)
    out = archive_path(out, wanted) if form.archive else out
    refuse_existing(out, force=force)
    model = open_artifact(find_model(source, wanted.model_form))
    sample = _first_rows(model, data) if data else random_sample(model, dict(parse_shape(text) for text in shapes))
    build = build_archive if form.archive else build_bundle
    with progress_step("bundle"):
        summary = build(
            source, out, target=wanted, sample=sample, runtime=form.runtime, runtime_file=form.runtime_file, force=force
        )
    sizes = {name: dataclasses.asdict(row) for name, row in summary.manifest.sizes.items()}
    archive_bytes = out.stat().st_size if form.archive else None
    if json:
        facts = {"runtime": summary.manifest.runtime_form, "was_run": summary.was_run, "archive_bytes": archive_bytes}
        show_json({"bundle": str(out), "target": wanted.name, **facts, "sizes": sizes})
        return
    show(bundle_table(sizes))
    note(
        f"archive: {out}, {archive_bytes:,} bytes" if form.archive else f"bundle: {out}   ({_how_to_run(out, summary)})"
    )


def _first_rows(model: Model, data: Path) -> dict[str, Array]:
    """Return the first of the user's own inputs, as many rows as one run of the model takes."""
    inputs, _ = signature(model.proto)
    _, feeds = next(iter(batches(for_validation(data, inputs), inputs, 1)))
    return dict(feeds)


def _how_to_run(out: Path, summary: BundleSummary) -> str:
    """Return how to go on with a bundle: its own program where that runs here, else the target's device."""
    if summary.was_run:
        program = ["python3", "-I"] if summary.manifest.entry_point == "run.py" else ["sh"]
        return f"run it: {shlex.join([*program, f'{out}/{summary.manifest.entry_point}'])}"
    if summary.manifest.entry_point is None:
        return f"it has no runtime: edgecompress bench OTHER_BUNDLE {shlex.quote(str(out))} times it on another's"
    return f"not run: it is for {summary.manifest.system} on {summary.manifest.architecture}; see {out / README}"


def verify_bundle(path: Path, *, json: bool) -> None:
    """Check a bundle, a folder or an archive, against its manifest."""
    manifest = verify_archive(path) if path.is_file() else run_verify(path)
    if json:
        show_json({"bundle": str(path), "target": manifest.target, "files": len(manifest.files), "ok": True})
    else:
        note(f"ok: {len(manifest.files)} files, target {manifest.target}, runtime {manifest.runtime_form}")


def bench(
    paths: Sequence[Path],
    *,
    device: str | None = None,
    options: BenchOptions,
    listen: str | None = None,
    shapes: Sequence[str] = (),
    json: bool = False,
) -> None:
    """Measure models or bundles in alternating runs on a device and print one row each, compared with the first.

    ``listen`` is the address on which the page of a web bundle waits for a browser from anywhere; None needs none.
    """
    paths = [_benchable(path) for path in paths]
    device = device or _default_device(paths)
    if listen is not None:
        samples = _served(paths, device, options, listen)
    else:
        samples = _measured(paths, device, options, shapes)
    names = [str(path) for path in paths] or [device]
    rows = bench_rows(names, samples, [artifact_bytes(path) for path in paths] or [None])
    if json:
        show_json({"device": device, "models": rows, "facts": device_facts(samples[0])})
        return
    facts = samples[0].metadata
    show(bench_table(rows, device=device, threads=facts["threads"]), device_line(facts))
    shared = ["peak memory is that of all models together"] if facts.get("memory_shared") else []
    subjects = [f"{name}: " if len(names) > 1 else "" for name in names]
    machine = [tuple(machine_warnings(each)) for each in samples]  # the same for all models, or nearly: told once
    found = [
        subject + text
        for subject, row, of_all in zip(subjects, rows, machine, strict=True)
        for text in row["warnings"]
        if text not in of_all
    ]
    for text in [*found, *max(machine, key=len), *shared, *facts["notes"]]:
        note(f"note: {text}")


def _benchable(path: Path) -> Path:
    """Return the bundle or the model file to measure: of a folder written by compress its model."""
    if (path / MANIFEST).is_file():
        return path
    if path.is_file() and path.name.endswith(SUFFIXES):
        raise UsageError(f"{path} is the archive of a bundle", hint="unpack it first, then name its folder")
    return find_model(path, "ecz")


def _measured(paths: Sequence[Path], device: str, options: BenchOptions, shapes: Sequence[str]) -> list[LatencySamples]:
    runner = open_runner(device)
    with progress_step("measure") as progress:
        bundles = [path for path in paths if (path / MANIFEST).is_file()]
        if len(bundles) == len(paths):
            if shapes:
                raise UsageError("--shape is for model files: a bundle brings its input", hint="leave it away")
            return runner.measure_bundles(paths, options=options)
        if bundles:
            hint = "make bundles of the model files too: a bundle's model runs on the bundle's own runtime"
            raise UsageError(f"{bundles[0]} is a bundle, and others are model files", hint=hint)
        models = [open_artifact(path) for path in paths]
        _refuse_other_inputs(models, paths)
        feeds = random_sample(models[0], dict(parse_shape(text) for text in shapes))
        together = max(map(payload_bytes, models)) <= LARGE_MODEL_BYTES
        del models  # the weights are not needed here, only in the processes that run them
        options = replace(options, alternate=together)
        return runner.measure(paths, feeds=feeds, options=options, progress=progress)


def _refuse_other_inputs(models: Sequence[Model], paths: Sequence[Path]) -> None:
    """Raise ``UsageError`` unless all models take the same inputs, free dimensions apart."""
    first, *others = (signature(model.proto)[0] for model in models)
    for path, inputs in zip(paths[1:], others, strict=True):
        pairs = {spec.name: spec for spec in inputs}
        if len(inputs) != len(first) or not all(_same_input(spec, pairs.get(spec.name)) for spec in first):
            raise UsageError(
                f"the models have different inputs: {_described(first)} in {paths[0]}, {_described(inputs)} in {path}",
                hint="measure them one at a time",
            )


def _same_input(one: TensorSpec, other: TensorSpec | None) -> bool:
    if other is None or one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    return all(None in pair or pair[0] == pair[1] for pair in zip(one.shape, other.shape, strict=True))


def _described(inputs: Sequence[TensorSpec]) -> str:
    shapes = [",".join("?" if size is None else str(size) for size in spec.shape) for spec in inputs]
    return "; ".join(f"{spec.name} {spec.dtype} {shape}" for spec, shape in zip(inputs, shapes, strict=True)) or "none"


def _served(paths: Sequence[Path], device: str, options: BenchOptions, listen: str) -> list[LatencySamples]:
    """Wait for a browser that opens the page of the first bundle."""
    if not device.startswith("browser:") or not all((path / MANIFEST).is_file() for path in paths):
        raise UsageError(
            "--serve takes web bundles", hint="edgecompress bundle OUT --target web -o DIR, then bench DIR"
        )
    return serve(paths, options=options, say=lambda address: note(f"open {address}"), host=listen)


def _default_device(paths: Sequence[Path]) -> str:
    """Return where the first of ``paths`` is timed unless the user says it: here, where it runs here.

    A bundle may be a stranger's. It does not choose a program or an image of this machine, nor a host to connect to.
    """
    if not paths or not (paths[0] / MANIFEST).is_file():
        return "local"
    manifest = run_verify(paths[0])
    device = "local" if runs_here(manifest) else manifest.default_device
    scheme, _, address = device.partition("://")
    if address and scheme != "qemu":
        raise UsageError(f"the bundle would be measured on {device}", hint=f"if you trust it: --device {device}")
    return device


def runtime_config(source: Path, *, target: str, out: Path | None, force: bool, json: bool) -> None:
    """Print what a model needs of a runtime, and the command that builds one with nothing else."""
    wanted = load_target(target)
    command = build_command(Path("ORT_TREE"), (out or Path("DIR")) / CONFIG, Path("BUILD"), wanted)
    needs = runtime_needs(source, out, force=force)
    if json:
        show_json({**dataclasses.asdict(needs), "command": command})
        return
    show(operator_table(needs.operators), usability_table(needs.usability))
    note(f"model.ort: {needs.ort_bytes:,} bytes" + (f", in {out} with {CONFIG}" if out else ""))
    note(f"a runtime for {wanted.name} with nothing else:\n  {shlex.join(command)}")
    if wanted.system == "linux":
        note(f"or: edgecompress runtime-build OUT --source ORT_TREE --target {shlex.quote(target)} -o DIR")


def runtime_build(
    source: Path, out: Path, *, tree: Path, target: str, defines: Sequence[str], force: bool, json: bool
) -> None:
    """Build the runtime of one model and print its size."""
    wanted = load_target(target)
    with progress_step("build") as progress:
        built = build_runtime(source, out, tree=tree, target=wanted, defines=defines, force=force, progress=progress)
    sizes = {"library_bytes": built.library.stat().st_size, "model_bytes": built.model.stat().st_size}
    if json:
        show_json({"library": str(built.library), "version": built.version, "cached": built.cached, **sizes})
        return
    how = "from the cache" if built.cached else "built"
    note(f"{how}: {built.library}, {sizes['library_bytes']:,} bytes, ONNX Runtime {built.version}")
    note(f"model: {built.model}, {sizes['model_bytes']:,} bytes")


def profile(model: Path, *, device: str, options: BenchOptions, again: bool, shapes: Sequence[str], json: bool) -> None:
    """Measure a model's kernels on a device and print their costs, their sum and the model's own time."""
    with as_onnx(model) as path, progress_step("profile") as progress:
        feeds = random_sample(open_artifact(path), dict(parse_shape(text) for text in shapes))
        found = profile_model(path, device=device, feeds=feeds, options=options, again=again, progress=progress)
    if json:
        show_json(profile_facts(found))
        return
    show(profile_table(found.costs))
    note(profile_line(found))
    note(f"table: {found.table}")
    for name in found.left_out:
        note(f"note: {name} cannot be timed alone: its cost is not in the sum")
    for warning in found.warnings:
        note(f"note: {warning}")
