"""What a report says besides its layers: which model, which tool, and what the reader should beware of."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

from edgecompress import __version__
from edgecompress.data import batches, rows_used
from edgecompress.evidence import describe
from edgecompress.model import model_digest, signature
from edgecompress.orientation import NO_BIAS
from edgecompress.passes.run import is_valid
from edgecompress.report.model import LayerRow, ModelFacts, Tool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgecompress.data import DataSet
    from edgecompress.metrics import Comparison
    from edgecompress.model import Array, Model, TensorSpec

_PACKAGES = ("numpy", "onnx", "onnxruntime", "onnx-graphsurgeon")


def tool_facts(command: str, digest: str) -> Tool:
    """Return the versions of everything that the result depends on; ``digest`` is that of the recipe or plan."""
    versions = {"edgecompress": __version__, "python": platform.python_version()}
    return Tool(
        command=command, recipe_hash=digest, versions={**versions, **{name: _version(name) for name in _PACKAGES}}
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # a build of the runtime under another name
        return "unknown"


def model_facts(model: Model) -> ModelFacts:
    """Return which model it was."""
    inputs, outputs = signature(model.proto)
    return ModelFacts(
        name=model.path.stem,
        sha256=model_digest(model),
        opset=model.opset,
        inputs=tuple(describe(spec) for spec in inputs),
        outputs=tuple(describe(spec) for spec in outputs),
    )


def caveats(
    model: Model, calibration: DataSet | None, test: DataSet | None, *, has_data: bool, too_large_to_time: bool
) -> Iterator[str]:
    """Yield one sentence for everything that weakens the evidence."""
    if not has_data:
        yield "no --data: solved from the weights alone, which costs accuracy; a few hundred unlabelled inputs help"
    if test is None:
        yield "no test data: agreement and distortion are those on random inputs and say nothing of accuracy"
    inputs, _ = signature(model.proto)
    if calibration is not None:
        yield from _flat(calibration, inputs)
    for name, rows in (("calibration", calibration), ("test", test)):
        left_out = rows_used(rows.rows, inputs)[1] if rows is not None else 0
        if left_out:
            yield f"{left_out} {name} rows do not fill a batch of the model's fixed size and were left out"
    if too_large_to_time:
        yield "too large to fold in memory: latency was not measured; use 'edgecompress bench' on the device"
    if not is_valid(model):
        yield "the ONNX checker refuses the original model, so the rewritten one was not checked with it either"


_FLAT_BATCH_ROWS = 32


def _flat(data: DataSet, inputs: Sequence[TensorSpec]) -> Iterator[str]:
    """Yield a sentence where the calibration data say nothing of what flows through the model: they never vary.

    Only floating point inputs count, where there are any: a mask of integers may well be the same everywhere. Reads on
    only as long as all is the same.
    """
    first: Mapping[str, Array] | None = None
    for _, feeds in batches(data, inputs, _FLAT_BATCH_ROWS):
        seen = {name: values for name, values in feeds.items() if values.dtype.kind == "f"} or feeds
        first = first or {name: values[:1] for name, values in seen.items()}
        if any(np.any(values != first[name]) for name, values in seen.items()):
            return
    values = [] if first is None else [np.unique(each) for each in first.values()]
    if all(each.size == 1 for each in values):
        found = ", ".join(f"{each[0]:g}" for each in values)
        yield f"the calibration data are the same everywhere ({found}): nothing can be learnt from them; check them"
    elif data.rows > 1:
        yield f"all {data.rows} calibration rows are the same: hardly anything can be learnt from them; check them"


_LOST_ERRORS = 3.0  # a drop of so many standard errors, and of a point, is no chance
_LOST_DB = 5.0


def doubts(model: Model, comparison: Comparison, rows: Sequence[LayerRow]) -> Iterator[str]:
    """Yield a sentence where the result is no good, or the test that judged it: what a reader must not overlook."""
    _, outputs = signature(model.proto)
    classes = outputs[0].shape[1] if len(outputs[0].shape) > 1 else None
    if comparison.metric.name == "top1" and classes and (comparison.original or 0.0) < 200.0 / classes:
        yield "the original itself is near chance on this data: check the preprocessing, the channel order, the labels"
    drop, error = comparison.drop_points or 0.0, comparison.standard_error_points or 0.0
    worst = min((found.sqnr_db for found in comparison.outputs.values() if found.sqnr_db is not None), default=_LOST_DB)
    fell = comparison.metric.name != "rmse" and drop > max(1.0, _LOST_ERRORS * error)
    if fell or worst < _LOST_DB:
        judged = [row for row in rows if row.output_sqnr_db is not None or row.weight_sqnr_db is not None]
        judged.sort(key=lambda row: row.weight_sqnr_db or 0.0 if row.output_sqnr_db is None else row.output_sqnr_db)
        names = ", ".join(row.name for row in judged[:3])
        lost = f"{comparison.metric.title} fell by {drop:.1f} points"
        what = lost if fell else f"an output has only {worst:.1f} dB SQNR"
        yield f"{what}: use more bits or keep more, by recipe at least for the worst layers ({names})"
    without = [row.name for row in rows if row.reason and NO_BIAS in row.reason]
    if without:
        yield (
            f"{len(without)} of {len(rows)} layers have no bias of their own for svd_bias to take up and were left "
            f"whole; svd needs none"
        )
