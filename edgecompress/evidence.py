"""Turn what a compression did into the rows and pictures of its report."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.factorize.forms import Spectral
from edgecompress.factorize.svd import spectrum
from edgecompress.graph import Graph, constants, values_of
from edgecompress.latency import LatencySamples, ratio, stability_warnings, summarize
from edgecompress.layers import Layer, Skip
from edgecompress.moments import Moments, output_errors, sqnr_db
from edgecompress.orientation import canonical, read_weight
from edgecompress.passes.factorize import dense_of
from edgecompress.passes.weights import scheme_of
from edgecompress.plan import TOO_FEW
from edgecompress.report.model import (
    UNTOUCHED,
    Accuracy,
    Latency,
    LatencySummary,
    LayerPlot,
    LayerRow,
    OutputDifference,
)

if TYPE_CHECKING:
    from edgecompress.container import PackResult
    from edgecompress.factorize.factors import Form
    from edgecompress.metrics import Comparison
    from edgecompress.model import Array, TensorSpec
    from edgecompress.plan import LayerPlan, Plan
    from edgecompress.validate import Validation
    from edgecompress.values import Values

_PLOTTED_LAYERS = 6
_HISTOGRAM_BINS = 80
_MAX_SPECTRUM_SIDE = 1536  # a full SVD above this takes longer than the rest of the report
_BLOCK_ROWS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the layers: the graph before and after factorizing, the constants that hold each layer now.

    ``forms`` are by layer, for those that are factorized; ``clusters`` and ``macs`` (multiply-accumulates of one run)
    are by constant. ``int8`` are the constants that run in 8 bits; ``kept_float`` says why others do not.
    """

    before: Graph
    after: Graph
    entries: Sequence[Layer | Skip]
    plan: Plan
    parts: Mapping[str, tuple[str, ...]]
    forms: Mapping[str, Form]
    clusters: Mapping[str, Values]
    moments: Mapping[str, Moments]
    macs: Mapping[str, int | None]
    int8: frozenset[str] = frozenset()
    kept_float: Mapping[str, str] = field(default_factory=dict)


def layer_rows(outcome: Outcome, packed: PackResult, originals: Mapping[str, Layer]) -> tuple[LayerRow, ...]:
    """Return one row per weight, in graph order; ``originals`` are the layers as they were before any shrank."""
    stored = {tensor.name: tensor.stored_bytes for tensor in packed.tensors}
    plans = {plan.layer: plan for plan in outcome.plan.layers}
    present = constants(outcome.after)
    rows = []
    for entry in outcome.entries:
        if isinstance(entry, Skip):
            rows.append(_skip_row(entry, stored))
        else:
            row = _layer_row(entry, plans[entry.name], outcome, stored=stored, present=present)
            rows.append(_against(row, originals.get(entry.name, entry)))
    return tuple(rows)


def _against(row: LayerRow, original: Layer) -> LayerRow:
    """Return the row of a layer with what it was before it shrank on its left side."""
    if original.shape == row.shape:
        return row
    scheme = f"shrunk to {' x '.join(map(str, row.shape))}"
    return replace(
        row,
        scheme=scheme if row.scheme == UNTOUCHED else f"{scheme}, {row.scheme}",
        shape=original.shape,
        parameters_before=original.parameters,
        macs_before=original.macs,
    )


def _skip_row(skip: Skip, stored: Mapping[str, int]) -> LayerRow:
    return LayerRow(
        name=skip.name,
        op=skip.op,
        scheme=UNTOUCHED,
        rank=None,
        parameters_before=skip.parameters,
        parameters_after=skip.parameters,
        stored_bytes=stored.get(skip.name),
        weight_sqnr_db=None,
        output_sqnr_db=None,
        reason=skip.reason,
        shape=skip.shape,
    )


def _layer_row(
    layer: Layer, plan: LayerPlan, outcome: Outcome, *, stored: Mapping[str, int], present: Mapping[str, Any]
) -> LayerRow:
    names = outcome.parts[layer.name]
    parameters = sum(math.prod(present[name].shape) for name in names)
    weight_db = output_db = None
    if is_changed(outcome, layer):
        weight, final = read_weight(outcome.before, layer), dense_weight(outcome, layer)
        weight_db = sqnr_db(*_energies(weight, final))
        if layer.name in outcome.moments:
            output_db = sqnr_db(*output_errors(weight, final, outcome.moments[layer.name]))
    return LayerRow(
        name=layer.name,
        op=layer.op,
        scheme=_scheme(layer, plan, outcome),
        rank=_rank(plan, outcome),
        parameters_before=layer.parameters,
        parameters_after=parameters,
        stored_bytes=sum(_stored_bytes(name, outcome, stored, present) for name in names),
        weight_sqnr_db=weight_db,
        output_sqnr_db=output_db,
        reason=_reason(plan, outcome),
        shape=layer.shape,
        macs_before=layer.macs,
        macs_after=_macs_after(layer, outcome),
    )


def _reason(plan: LayerPlan, outcome: Outcome) -> str | None:
    """Return why a stage leaves a layer alone, int8 included."""
    names = outcome.parts[plan.layer]
    if outcome.plan.quantize != "int8":
        return plan.reason
    if outcome.int8.intersection(names):  # it has 8 bits for each value, however few there are
        return "; ".join(part for part in (plan.reason or "").split("; ") if TOO_FEW not in part) or None
    why = next((outcome.kept_float[name] for name in names if name in outcome.kept_float), "its weight is computed")
    return f"{plan.reason}; not in int8: {why}" if plan.reason else f"not in int8: {why}"


def is_changed(outcome: Outcome, layer: Layer) -> bool:
    """Tell whether a layer is factorized or clustered."""
    names = outcome.parts[layer.name]
    return layer.name in outcome.forms or names[0] in outcome.clusters


def dense_weight(outcome: Outcome, layer: Layer) -> Array:
    """Return the canonical weight that a layer has now: its clusters looked up, its factors multiplied out."""
    present = constants(outcome.after)
    parts = [
        outcome.clusters[name].to_dense() if name in outcome.clusters else values_of(outcome.after, present[name])
        for name in outcome.parts[layer.name]
    ]
    form = outcome.forms.get(layer.name)
    return canonical(parts[0], layer) if form is None else dense_of(parts, layer, form)


def _macs_after(layer: Layer, outcome: Outcome) -> int | None:
    """Return the multiply-accumulates of a layer's factors; a weight in its frequency form still multiplies whole."""
    if isinstance(outcome.forms.get(layer.name), Spectral):
        return layer.macs
    return _sum([outcome.macs.get(name) for name in outcome.parts[layer.name]])


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _rank(plan: LayerPlan, outcome: Outcome) -> int | None:
    """Return the rank of a form that has one; where there are two, the scheme names them."""
    rank = plan.factorize.rank if plan.factorize is not None and plan.layer in outcome.forms else None
    return rank if isinstance(rank, int) else None


def _scheme(layer: Layer, plan: LayerPlan, outcome: Outcome) -> str:
    names = outcome.parts[layer.name]
    steps = []
    if plan.factorize is not None and layer.name in outcome.forms:
        steps.append(f"{plan.factorize.scheme} rank {'x'.join(map(str, plan.factorize.ranks))}")
    steps += dict.fromkeys(scheme_of(outcome.clusters[name]) for name in names if name in outcome.clusters)
    steps += ["int8"] if outcome.int8.intersection(names) else []
    return ", ".join(steps) or UNTOUCHED


def _stored_bytes(name: str, outcome: Outcome, stored: Mapping[str, int], present: Mapping[str, Any]) -> int:
    """Return the bytes of a constant in the container; what stays in the skeleton counts at its raw size."""
    form = outcome.clusters.get(name)
    if form is None:
        return stored.get(name, int(values_of(outcome.after, present[name]).nbytes))
    parts = vars(form).items()  # codebook and indices, or step and codes
    return sum(stored.get(f"{name}.{part}", _deflated_bytes(array)) for part, array in parts)


def _deflated_bytes(array: Array) -> int:
    """Return about what values take that are deflated with the rest of the file."""
    return len(zlib.compress(np.ascontiguousarray(array).tobytes(), 9))


def _energies(weight: Array, final: Array) -> tuple[float, float]:
    """Return the energies of a weight and of its error, blockwise so that a mapped weight is never copied whole."""
    signal = error = 0.0
    step = max(1, _BLOCK_ROWS // max(1, int(np.prod(weight.shape[1:], dtype=np.int64))))
    for start in range(0, weight.shape[0], step):
        block = weight[start : start + step].astype(np.float64)
        signal += float(np.vdot(block, block))
        block -= final[start : start + step]
        error += float(np.vdot(block, block))
    return signal, error


def layer_plots(outcome: Outcome) -> tuple[LayerPlot, ...]:
    """Return the spectrum, histogram and codebook of the biggest layers, biggest first."""
    layers = [entry for entry in outcome.entries if isinstance(entry, Layer)]
    biggest = sorted(layers, key=lambda layer: -layer.parameters)[:_PLOTTED_LAYERS]
    plans = {plan.layer: plan for plan in outcome.plan.layers}
    return tuple(_plot(layer, outcome, plans[layer.name]) for layer in biggest)


def _plot(layer: Layer, outcome: Outcome, plan: LayerPlan) -> LayerPlot:
    weight = read_weight(outcome.before, layer)
    names = outcome.parts[layer.name]
    whole = layer.name not in outcome.forms
    few = outcome.clusters.get(names[0]) if whole else None
    codebook = np.empty(0) if few is None else np.unique(few.to_dense())
    side = min(weight.shape[0], layer.parameters // weight.shape[0])
    values = spectrum(weight) if layer.fixed_form is None and side <= _MAX_SPECTRUM_SIDE else np.empty(0)
    sample = weight.reshape(-1)[:: max(1, weight.size >> 22)]
    counts, edges = np.histogram(sample, bins=_HISTOGRAM_BINS)
    return LayerPlot(
        name=layer.name,
        singular_values=tuple(float(value) for value in values),
        rank=_rank(plan, outcome),
        histogram_edges=tuple(float(edge) for edge in edges),
        histogram_counts=tuple(int(count) for count in counts),
        codebook=tuple(float(value) for value in codebook),
    )


def accuracy_of(validation: Validation) -> Accuracy:
    """Return the accuracy section."""
    comparison = validation.comparison
    return Accuracy(
        metric=comparison.metric.title,
        original=comparison.original,
        compressed=comparison.compressed,
        drop_points=comparison.drop_points,
        standard_error_points=comparison.standard_error_points,
        samples=comparison.samples,
        agreement=comparison.agreement,
        data=validation.data,
    )


def outputs_of(comparison: Comparison) -> dict[str, OutputDifference]:
    """Return the distortion of every output."""
    return {name: OutputDifference(found.sqnr_db, found.max_abs) for name, found in comparison.outputs.items()}


def latency_of(original: LatencySamples, compressed: LatencySamples, *, device: str, threads: int) -> Latency:
    """Return the latency section; warnings name the model that they are about."""
    both = {"original": original, "compressed": compressed}
    return Latency(
        original=_summary(original),
        compressed=_summary(compressed),
        ratio=ratio(compressed, original),
        device=device,
        threads=threads,
        warnings=tuple(f"{name}: {text}" for name, samples in both.items() for text in stability_warnings(samples)),
    )


def _summary(samples: LatencySamples) -> LatencySummary:
    found = summarize(samples)
    return LatencySummary(
        init_ms=found.init_ms,
        first_ms=found.first_ms,
        median_ms=found.median_ms,
        p90_ms=found.p90_ms,
        samples=found.samples,
        peak_rss_bytes=found.peak_rss_bytes,
        values_ms=samples.values_ms,
    )


def describe(spec: TensorSpec) -> str:
    """Return an input or output as ``name float32 (N, 3, 32, 32)``."""
    dims = ", ".join(
        "N" if size is None and axis == 0 else "?" if size is None else str(size)
        for axis, size in enumerate(spec.shape)
    )
    return f"{spec.name} {spec.dtype} ({dims})"
