"""compress(): the whole story on one page. Factorize the graph, cluster the values, encode the bytes, prove it."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from threadpoolctl import threadpool_limits

from edgecompress.calibrate import calibrate
from edgecompress.case import Case, Request, open_case
from edgecompress.container import pack
from edgecompress.decide import decide
from edgecompress.devices import BenchOptions, open_runner
from edgecompress.errors import OutputError, RecipeError
from edgecompress.evidence import accuracy_of, latency_of, layer_plots, layer_rows, outputs_of
from edgecompress.facts import caveats, doubts, model_facts, tool_facts
from edgecompress.files import refuse_existing, sha256_of, staged_folder
from edgecompress.graph import open_graph
from edgecompress.layers import Layer, default_shapes, find_layers
from edgecompress.model import model_digest, payload_bytes, stored_bytes
from edgecompress.orientation import read_weight
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from edgecompress.passes.self_extracting import extract_in_graph
from edgecompress.passes.solve import Calibration
from edgecompress.plan import plan_to_json
from edgecompress.plan_file import PlanFile, check_plan, read_plan
from edgecompress.recipe import check_recipe, recipe_hash
from edgecompress.report.html import to_html
from edgecompress.report.model import Report, Size, StageBytes, compression_ratio, to_json
from edgecompress.save import save_model
from edgecompress.sequential import Walk
from edgecompress.stages import layers_in, packed_size, run_shrink, run_stages, with_biases
from edgecompress.steps import Attempt, fit_scale, grid_layers, relative_steps, scale_for_bits, with_steps
from edgecompress.validate import sample_feeds, validate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgecompress.container import PackResult
    from edgecompress.evidence import Outcome
    from edgecompress.graph import Graph
    from edgecompress.model import Array, Model
    from edgecompress.moments import Moments
    from edgecompress.passes.pairs import Pair
    from edgecompress.plan import LayerPlan, Plan
    from edgecompress.report.model import Latency
    from edgecompress.validate import Validation

MODEL_FILE, CONTAINER_FILE, SELF_EXTRACTING_FILE = "model.onnx", "model.ecz", "model_self_extracting.onnx"

_MIN_RUNS, _MAX_RUNS, _TIMING_BUDGET_MS = 10, 100, 4000.0


def compress(source: Path | str, out: Path | str, request: Request | None = None) -> Report:
    """Compress the ONNX model at ``source`` into the folder ``out``; return the report.

    Writes model.onnx, model.ecz, plan.json, report.json and report.html (and model_self_extracting.onnx where it is
    asked for), all at the end: a failure leaves nothing.

    Raises:
        RecipeError, ModelError, DataError, PassError, OutputError: see ``edgecompress.errors``.
    """
    # One thread: the products are small, so that more mostly wait for each other, and the last digits of a sum
    # depend on how many share it, while the same input has to give the same bytes on every machine.
    with threadpool_limits(limits=1, user_api="blas"):
        return _compress(Path(source), Path(out), request or Request())


def _compress(source: Path, out: Path, request: Request) -> Report:
    refuse_existing(out, force=request.force)
    if source.resolve() in ((out / MODEL_FILE).resolve(), (out / CONTAINER_FILE).resolve()):
        raise OutputError(f"{source}: the output would replace the input", hint="choose another folder")
    case = open_case(source, request)

    given = read_plan(request.plan, model_sha256=model_digest(case.model)) if request.plan is not None else None
    whole, _ = run_pass(case.model, "prepare", prepare, case.feeds)
    free = {**default_shapes(open_graph(whole)), **request.shapes}
    before = {layer.name: layer for layer in layers_in(find_layers(open_graph(whole), free))}
    prepared, shrunk = _shrink(case, whole, given, request)
    plan, moments = _decide(case, prepared, given, shrunk, free=free, request=request)
    prepared, known = _known(case, prepared, plan, moments, request)
    plan, final, outcome = _solve(case, prepared, plan, known, originals=before, free=free, request=request)

    with staged_folder(out, force=request.force) as staging:
        packed = _encode(final, staging, request)
        if request.self_extracting:
            _write_self_extracting(final, staging, case.feeds)
        validation, latency = _prove(case, staging / CONTAINER_FILE, request)
        rows = layer_rows(outcome, packed, before)
        digest = recipe_hash(request.recipe) if request.plan is None else sha256_of(request.plan)[:16]
        report = Report(
            tool=tool_facts(request.command, digest),
            model=model_facts(case.model),
            size=_size(case.model, outcome.after.model, staging / MODEL_FILE, packed, plan),
            accuracy=accuracy_of(validation),
            outputs=outputs_of(validation.comparison),
            latency=latency,
            layers=rows,
            plots=layer_plots(outcome),
            warnings=(*_warnings(case, request), *doubts(case.model, validation.comparison, rows)),
        )
        for name, text in (
            ("plan.json", plan_to_json(plan)),
            ("report.json", to_json(report)),
            ("report.html", to_html(report)),
        ):
            (staging / name).write_text(text, encoding="utf-8")
    if not request.self_extracting:  # one of an earlier run would be that of another model
        (out / SELF_EXTRACTING_FILE).unlink(missing_ok=True)
    return report


def _shrink(case: Case, model: Model, given: PlanFile | None, request: Request) -> tuple[Model, dict[str, int]]:
    """Return the model with fewer outputs of hidden layers, and how many each of those layers keeps."""
    share = request.recipe.shrink if given is None else None
    if share is None and (given is None or not given.shrink):
        return model, {}
    if case.calibration is None:
        raise RecipeError("shrink refits layers on calibration data", hint="give --data, without --no-calibrate")
    first = next((layer.name for layer in layers_in(find_layers(open_graph(model))) if layer.op == "Conv"), None)

    def wanted(pairs: Mapping[str, Pair]) -> Mapping[str, int]:
        if given is not None:
            return given.shrink
        assert share is not None
        return {name: max(1, round(share * pair.units)) for name, pair in pairs.items() if name != first}

    with request.step("shrink") as progress:
        return run_shrink(
            model, case.calibration, wanted, asymmetric=request.asymmetric, feeds=case.feeds, progress=progress
        )


def _decide(
    case: Case,
    model: Model,
    given: PlanFile | None,
    shrunk: Mapping[str, int],
    *,
    free: Mapping[str, tuple[int, ...]],
    request: Request,
) -> tuple[Plan, dict[str, Moments]]:
    """Return the plan, that of ``--plan`` where there is one, and the moments of all layers."""
    graph = open_graph(model)
    entries = find_layers(graph, free)
    if given is None:
        check_recipe(request.recipe, entries)
    plan = check_plan(given, entries, opset=case.model.opset) if given is not None else None
    if plan is not None and case.calibration is None and any(_is_calibrated(entry) for entry in plan.layers):
        raise RecipeError(
            f"{request.plan}: the plan has calibrated layers, which need data",
            hint=f"{'leave --no-calibrate out' if request.data else 'give --data'}, or set calibrated to false in it",
        )
    moments = _calibrate(case, model, layers_in(entries), request)
    if plan is None:
        with request.step("plan") as progress:
            plan = decide(
                request.recipe,
                case.model,
                graph,
                entries,
                moments=moments,
                data=case.calibration,
                shrink=shrunk,
                progress=progress,
            )
    if plan.quantize == "int8" and case.calibration is None:
        raise RecipeError("int8 takes the ranges of activations from calibration data", hint="give --data")
    _check_untouched(graph, layers_in(entries), plan)
    return plan, moments


def _check_untouched(graph: Graph, layers: list[Layer], plan: Plan) -> None:
    """Raise ``ModelError`` for NaN or Inf in a weight that no stage reads; the stages look at the others."""
    left_alone = {entry.layer for entry in plan.layers if entry.factorize is None and entry.weights is None}
    for layer in layers:
        if layer.name in left_alone:
            read_weight(graph, layer)


def _is_calibrated(entry: LayerPlan) -> bool:
    return any(stage is not None and stage.calibrated for stage in (entry.factorize, entry.weights))


def _calibrate(case: Case, model: Model, layers: list[Layer], request: Request) -> dict[str, Moments]:
    if case.calibration is None:
        return {}
    with request.step("calibrate") as progress:
        return calibrate(model, layers, case.calibration, progress=progress)


def _known(
    case: Case, model: Model, plan: Plan, moments: dict[str, Moments], request: Request
) -> tuple[Model, Calibration]:
    """Return the model with the biases that corrections need, and what calibration knows of it."""
    if case.calibration is None:
        return model, Calibration()
    names: dict[str, str] = {}
    if request.correct:
        model, names = with_biases(model, plan, case.feeds)
    return model, Calibration(
        moments=moments,
        biases=names,
        walk=partial(Walk, model, case.calibration),
        asymmetric=request.asymmetric,
        correct=request.correct,
        feedback=request.feedback,
    )


def _solve(
    case: Case,
    model: Model,
    plan: Plan,
    known: Calibration,
    *,
    originals: Mapping[str, Layer],
    free: Mapping[str, tuple[int, ...]],
    request: Request,
) -> tuple[Plan, Model, Outcome]:
    """Run the stages that the plan asks for; return the plan as it was carried out, the model and what became of it."""
    entries = find_layers(open_graph(model), free)

    def run(asked: Plan, name: str) -> tuple[Plan, Model, Outcome]:
        with request.step(name) as progress:
            stages = run_stages(
                model, entries, asked, known, data=case.calibration, free=free, feeds=case.feeds, progress=progress
            )
        return asked, *stages

    budget = request.recipe.target_size or request.recipe.average_bits
    if request.plan is not None or budget is None:
        return run(plan, "compress layers")
    layers = grid_layers(plan, layers_in(entries))
    if not layers:
        raise RecipeError("no layer is on a grid, whose step a budget could size", hint='set cluster to "grid"')
    with request.step("measure layers") as progress:
        relative = relative_steps(open_graph(model), layers, known.moments, case.calibration, progress=progress)
    attempts = itertools.count(1)

    def attempt(scale: float) -> Attempt[tuple[Plan, Model, Outcome]]:
        """Carry the plan out at a scale of its steps, and count what it takes of the budget."""
        found = run(with_steps(plan, relative, scale), f"compress layers, attempt {next(attempts)}")
        packed = packed_size(found[1])
        rows = layer_rows(found[2], packed, originals)
        coded = sum(row.stored_bytes or 0 for row in rows)
        weights = sum(row.parameters_before for row in rows)
        spent = packed.stored_bytes if request.recipe.target_size is not None else coded * 8 / weights
        return Attempt(found, spent=spent, bits=coded * 8 / weights)

    by_size = request.recipe.target_size is not None
    weights = sum(layer.parameters for layer in originals.values())
    return fit_scale(
        attempt,
        scale_for_bits(open_graph(model), layers, relative, 0.9 * budget * 8 / weights if by_size else budget),
        budget,
        per_bit=weights / 8 if by_size else 1.0,
        unit="bytes" if by_size else "bits a weight",
    )


def _encode(model: Model, folder: Path, request: Request) -> PackResult:
    save_model(model, folder / MODEL_FILE)
    with request.step("encode") as progress:
        return pack(folder / MODEL_FILE, folder / CONTAINER_FILE, progress=progress)


def _write_self_extracting(model: Model, folder: Path, feeds: Mapping[str, Array] | None) -> None:
    """Write the model whose values are Huffman-coded inside the graph and decoded when a session starts."""
    result, changes = run_pass(model, "self-extracting", extract_in_graph, feeds)
    if not changes:
        raise RecipeError(
            f"a self-extracting model would not be smaller than {MODEL_FILE}: no layer has values few enough",
            hint="ask for fewer bits or wider steps, or leave --self-extracting out",
        )
    save_model(result, folder / SELF_EXTRACTING_FILE)


def _prove(case: Case, compressed: Path, request: Request) -> tuple[Validation, Latency | None]:
    """Compare the two models and time them in alternating runs."""
    source = case.model.path
    with request.step("validate") as progress:
        validation = validate(source, compressed, case.test, low_memory=case.is_large, progress=progress)
    if case.is_large:
        return validation, None
    runs = int(min(_MAX_RUNS, max(_MIN_RUNS, _TIMING_BUDGET_MS / max(validation.row_ms, 1e-3))))
    feeds = sample_feeds(case.test, case.inputs, request.shapes)
    with request.step("measure") as progress:
        options = BenchOptions(threads=request.threads, runs=runs)
        samples = open_runner("local").measure([source, compressed], feeds=feeds, options=options, progress=progress)
    return validation, latency_of(samples[0], samples[1], device="local", threads=request.threads)


def _size(model: Model, factorized: Model, written: Path, packed: PackResult, plan: Plan) -> Size:
    """Return the sizes: of the files, and of the model after each stage that did something."""
    original, onnx = stored_bytes(model.path), stored_bytes(written)
    stages = [StageBytes("original", original)]
    if any(entry.factorize for entry in plan.layers):
        stages.append(StageBytes("factorize", original + payload_bytes(factorized) - payload_bytes(model)))
    if any(entry.weights for entry in plan.layers):
        stages.append(StageBytes("cluster", onnx))
    return Size(
        original_bytes=original,
        onnx_bytes=onnx,
        ecz_bytes=packed.stored_bytes,
        compression_ratio=compression_ratio(original, packed.stored_bytes),
        waterfall=(*stages, StageBytes("encode", packed.stored_bytes)),
    )


def _warnings(case: Case, request: Request) -> tuple[str, ...]:
    return tuple(
        caveats(
            case.model,
            case.calibration,
            case.test_set,
            has_data=request.data is not None,
            too_large_to_time=case.is_large,
        )
    )
