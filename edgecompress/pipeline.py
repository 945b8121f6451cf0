"""compress(): the whole story on one page. Factorize the graph, cluster the values, encode the bytes, prove the result."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgecompress import __version__
from edgecompress.calibrate import calibrate
from edgecompress.container import pack
from edgecompress.data import DataSet, check_shapes, for_validation, rows_used, split
from edgecompress.devices import open_runner
from edgecompress.evidence import (
    Outcome,
    accuracy_of,
    describe,
    latency_of,
    layer_plots,
    layer_rows,
    outputs_of,
)
from edgecompress.factorize.forms import LowRank
from edgecompress.files import refuse_existing, sha256_of, staged_folder
from edgecompress.graph import integer_limits, open_graph
from edgecompress.latency import LatencySamples
from edgecompress.layers import Layer, Skip, default_shapes, find_layers
from edgecompress.model import Array, Model, TensorSpec, load_model, payload_bytes, save_model, signature, stored_bytes
from edgecompress.moments import Moments
from edgecompress.passes.factorize import factorize, solve_low_rank
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import is_valid, run_pass
from edgecompress.passes.weights import codebooks, solve_codebooks
from edgecompress.plan import Plan, make_plan, plan_to_json, read_plan
from edgecompress.recipe import Recipe, check_recipe, recipe_hash
from edgecompress.report.html import to_html
from edgecompress.report.model import (
    Latency,
    ModelFacts,
    Report,
    Size,
    StageBytes,
    Tool,
    compression_ratio,
    to_json,
)
from edgecompress.validate import TestRows, Validation, random_rows, rows_of, sample_feeds, validate

LARGE_MODEL_BYTES = 1 << 30
"""Above this many weight bytes both models run unoptimized, one after the other, and latency is not measured:
folding the clusters of all layers at once would take 2.4 times the memory of the weights."""

MODEL_FILE, CONTAINER_FILE = "model.onnx", "model.ecz"
_MIN_RUNS, _MAX_RUNS, _TIMING_BUDGET_MS = 10, 100, 4000.0
_LARGE_MODEL_ROWS = 4

Step = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]


def _silent(_: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What ``compress`` was asked for. ``step`` is called with the name of every long stage and gives its progress callback."""

    recipe: Recipe = field(default_factory=Recipe)
    plan: Path | None = None
    data: Path | None = None
    test_data: Path | None = None
    calibrate: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    force: bool = False
    command: str = "edgecompress.compress(...)"
    threads: int = 1
    step: Step = _silent


def compress(source: Path, out: Path, request: Request | None = None) -> Report:
    """Compress the ONNX model at ``source`` into the folder ``out``: model.onnx, model.ecz, plan.json, report.json, report.html.

    Everything is written to a temporary folder and moved into place at the end: a failure leaves nothing behind.

    Raises:
        RecipeError, ModelError, DataError, PassError, OutputError: see ``edgecompress.errors``.
    """
    request = request or Request()
    refuse_existing(out, force=request.force)
    model = load_model(source)
    inputs, _ = signature(model.proto)
    check_shapes(request.shapes, inputs)
    calibration, test_set = _data(request, inputs)
    test = _test_rows(model, test_set, request)
    feeds = None if payload_bytes(model) > LARGE_MODEL_BYTES else sample_feeds(test, inputs, request.shapes)

    prepared, _ = run_pass(model, "prepare", prepare, feeds)
    graph = open_graph(prepared)
    entries = find_layers(graph, {**default_shapes(graph), **request.shapes})
    plan = _plan(request, entries, model, calibrated=calibration is not None)
    moments = _moments(prepared, entries, calibration, request)

    factorized, parts, waterfall = _factorize(prepared, entries, plan, moments, request=request, feeds=feeds)
    with request.step("cluster") as progress:
        layers = _layers(entries)
        clusters = solve_codebooks(open_graph(factorized), layers, plan, parts, moments=moments, progress=progress)
        final, _ = run_pass(factorized, "cluster", lambda graph: codebooks(graph, clusters), feeds)

    with staged_folder(out, force=request.force) as staging:
        save_model(final, staging / MODEL_FILE)
        with request.step("encode") as progress:
            packed = pack(staging / MODEL_FILE, staging / CONTAINER_FILE, progress=progress)
        outcome = Outcome(
            before=graph, after=open_graph(factorized), entries=entries, plan=plan, parts=parts, clusters=clusters, moments=moments
        )
        rows, plots = layer_rows(outcome, packed), layer_plots(outcome)
        validation, latency = _prove(source, staging / CONTAINER_FILE, test, inputs, request=request, large=feeds is None)
        original, onnx = stored_bytes(source), stored_bytes(staging / MODEL_FILE)
        stages = [("original", original), *waterfall, *([("cluster", onnx)] if clusters else []), ("encode", packed.stored_bytes)]
        report = Report(
            tool=_tool(request),
            model=_facts(model),
            size=Size(
                original_bytes=original,
                onnx_bytes=onnx,
                ecz_bytes=packed.stored_bytes,
                compression_ratio=compression_ratio(original, packed.stored_bytes),
                waterfall=tuple(StageBytes(name, size) for name, size in stages),
            ),
            accuracy=accuracy_of(validation),
            outputs=outputs_of(validation.comparison),
            latency=latency,
            layers=rows,
            plots=plots,
            warnings=_warnings(model, (calibration, test_set), inputs, request=request, large=feeds is None),
        )
        (staging / "plan.json").write_text(plan_to_json(plan), encoding="utf-8")
        (staging / "report.json").write_text(to_json(report), encoding="utf-8")
        (staging / "report.html").write_text(to_html(report), encoding="utf-8")
    return report


def _layers(entries: list[Layer | Skip]) -> list[Layer]:
    return [entry for entry in entries if isinstance(entry, Layer)]


def _data(request: Request, inputs: tuple[TensorSpec, ...]) -> tuple[DataSet | None, DataSet | None]:
    """Return the calibration and the test set; calibration is ``None`` when it is not wanted."""
    if request.data is None:
        return None, None if request.test_data is None else for_validation(request.test_data, inputs)
    calibration, test = split(request.data, request.test_data, inputs)
    return (calibration if request.calibrate else None), test


def _test_rows(model: Model, test_set: DataSet | None, request: Request) -> TestRows:
    inputs, _ = signature(model.proto)
    if test_set is not None:
        return rows_of(test_set, inputs)
    rows = {"rows": _LARGE_MODEL_ROWS} if payload_bytes(model) > LARGE_MODEL_BYTES else {}
    return random_rows(inputs, integer_limits(open_graph(model)), request.shapes, **rows)


def _plan(request: Request, entries: list[Layer | Skip], model: Model, *, calibrated: bool) -> Plan:
    digest = sha256_of(model.path)
    if request.plan is not None:
        return read_plan(request.plan, model_sha256=digest, entries=entries)
    check_recipe(request.recipe, entries)
    return make_plan(request.recipe, entries, model_sha256=digest, calibrated=calibrated)


def _moments(model: Model, entries: list[Layer | Skip], data: DataSet | None, request: Request) -> dict[str, Moments]:
    if data is None:
        return {}
    with request.step("calibrate") as progress:
        return calibrate(model, _layers(entries), data, progress=progress)


def _factorize(
    model: Model,
    entries: list[Layer | Skip],
    plan: Plan,
    moments: Mapping[str, Moments],
    *,
    request: Request,
    feeds: Mapping[str, Array] | None,
) -> tuple[Model, dict[str, tuple[str, ...]], list[tuple[str, int]]]:
    """Return the factorized model, the constants that hold each layer, and the waterfall's entry where anything was factorized."""
    layers = _layers(entries)
    parts = {layer.name: (layer.name,) for layer in layers}
    if not any(entry.factorize for entry in plan.layers):
        return model, parts, []
    with request.step("factorize") as progress:
        forms: dict[str, LowRank] = solve_low_rank(open_graph(model), layers, plan, moments, progress=progress)
        result, changes = run_pass(
            model, "factorize", lambda graph: factorize(graph, _layers(find_layers(graph)), forms), feeds
        )
    parts.update({change.layer: change.tensors for change in changes})
    structure = result.proto.ByteSize() if not any(t.external_data for t in result.proto.graph.initializer) else 0
    return result, parts, [("factorize", structure or payload_bytes(result))]


def _prove(
    source: Path,
    compressed: Path,
    test: TestRows,
    inputs: tuple[TensorSpec, ...],
    *,
    request: Request,
    large: bool,
) -> tuple[Validation, Latency | None]:
    """Compare the two models and time them in alternating runs."""
    with request.step("validate") as progress:
        validation = validate(source, compressed, test, low_memory=large, progress=progress)
    if large:
        return validation, None
    runs = int(min(_MAX_RUNS, max(_MIN_RUNS, _TIMING_BUDGET_MS / max(validation.row_ms, 1e-3))))
    feeds = sample_feeds(test, inputs, request.shapes)
    with request.step("measure") as progress:
        samples: list[LatencySamples] = open_runner("local").measure(
            [source, compressed], feeds=feeds, threads=request.threads, runs=runs, progress=progress
        )
    return validation, latency_of(samples[0], samples[1], device="local", threads=request.threads)


def _tool(request: Request) -> Tool:
    return Tool(
        command=request.command,
        recipe_hash=recipe_hash(request.recipe) if request.plan is None else sha256_of(request.plan)[:16],
        versions={"edgecompress": __version__, "python": platform.python_version(), **_versions()},
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("numpy", "onnx", "onnxruntime", "onnx-graphsurgeon"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build of the runtime under another name
            found[name] = "unknown"
    return found


def _facts(model: Model) -> ModelFacts:
    inputs, outputs = signature(model.proto)
    return ModelFacts(
        name=model.path.stem,
        sha256=sha256_of(model.path),
        opset=model.opset,
        inputs=tuple(describe(spec) for spec in inputs),
        outputs=tuple(describe(spec) for spec in outputs),
    )


def _warnings(
    model: Model,
    sets: tuple[DataSet | None, DataSet | None],
    inputs: tuple[TensorSpec, ...],
    *,
    request: Request,
    large: bool,
) -> tuple[str, ...]:
    calibration, test = sets
    found = []
    if calibration is None and request.data is None:
        found.append("no --data: solved from the weights alone, which costs accuracy; a few hundred unlabelled inputs change that")
    if test is None:
        found.append("no test data: agreement and distortion are those on random inputs and say nothing of accuracy")
    for name, rows in (("calibration", calibration), ("test", test)):
        left_out = rows_used(rows.rows, inputs)[1] if rows is not None else 0
        if left_out:
            found.append(f"{left_out} {name} rows do not fill a batch of the model's fixed size and were left out")
    if large:
        found.append("the model is too large to fold in memory: latency was not measured; use 'edgecompress bench' on the device")
    if not is_valid(model):
        found.append("the ONNX checker refuses the original model; the rewritten one was not checked with it either")
    return tuple(found)
