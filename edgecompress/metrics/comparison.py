"""Two models over the same rows: accuracy, drop and its paired standard error, accumulated batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError
from edgecompress.imports import import_callable, one_line
from edgecompress.metrics.definition import Metric, first_float, resolve
from edgecompress.metrics.distortion import Distortion, distortion, merge
from edgecompress.metrics.scores import agreement, count_rows, score

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]


@dataclass(frozen=True)
class Comparison:
    """Both models under one metric over ``samples`` rows.

    Percent, and a positive drop is worse; for rmse the output's unit, and the drop is compressed minus original. The
    standard error is that of the paired difference, in the same unit. None is unknown. ``agreement`` is the percentage
    of positions with the same argmax, whatever the metric; ``outputs`` has the distortion of every output.
    """

    metric: Metric
    original: float | None
    compressed: float | None
    drop_points: float | None
    standard_error_points: float | None
    samples: int
    agreement: float | None
    outputs: Mapping[str, Distortion]


@dataclass(frozen=True)
class State:
    """What has been seen: a number per row and model; only a custom function needs whole outputs."""

    metric: Metric
    samples: int = 0
    original: tuple[Array, ...] = ()
    compressed: tuple[Array, ...] = ()
    agreement: tuple[Array, ...] = ()
    outputs: Mapping[str, Distortion] = field(default_factory=dict)
    whole: tuple[tuple[Outputs, Outputs, Array | None], ...] = ()


def start(metric: Metric) -> State:
    """Return the state before the first batch. Raises ``DataError`` where a custom function cannot be imported."""
    if metric.name == "function":
        import_callable(metric.function, what="metric", error=DataError)
    return State(metric)


def add(
    state: State, original: Outputs, compressed: Outputs, *, labels: Array | None = None, inputs: Outputs | None = None
) -> State:
    """Return the state after one more batch: the outputs of both models, by name, for the same rows.

    ``labels`` (rows, ...) are this batch's, ``inputs`` its feeds; they tell the number of rows and serve rmse.
    Raises ``DataError`` where labels do not fit the outputs.
    """
    rows = count_rows(original, labels, inputs)
    first = first_float(original)
    metric = resolve(state.metric, labels, original[first].shape if first else ())
    same = None if first is None or first not in compressed else agreement(original[first], compressed[first], rows)
    outputs = {
        name: merge(state.outputs.get(name, Distortion()), distortion(values, compressed.get(name)))
        for name, values in original.items()
    }
    state = replace(
        state,
        metric=metric,
        samples=state.samples + rows,
        agreement=(*state.agreement, _known(same, rows)),
        outputs=outputs,
    )
    if metric.name == "function":
        return replace(state, whole=(*state.whole, (original, compressed, labels)))
    before = score(metric, original, reference=original, labels=labels, inputs=inputs)
    after = score(metric, compressed, reference=original, labels=labels, inputs=inputs)
    return replace(
        state,
        original=(*state.original, _known(before, rows)),
        compressed=(*state.compressed, _known(after, rows)),
    )


def finish(state: State) -> Comparison:
    """Return the comparison over all rows added. Raises ``DataError`` where a custom function fails."""
    error = None
    if state.metric.name == "function":
        original, compressed = _call(state, 0), _call(state, 1)
    else:
        before, after = _joined(state.original), _joined(state.compressed)
        original, compressed = _total(state.metric, before), _total(state.metric, after)
        if original is not None and compressed is not None:
            error = _standard_error(state.metric, before, after)
    drop = None
    if original is not None and compressed is not None:
        drop = compressed - original if state.metric.name == "rmse" else original - compressed
    same = _total(Metric("agreement"), _joined(state.agreement))
    return Comparison(state.metric, original, compressed, drop, error, state.samples, same, state.outputs)


def compare(
    metric: Metric, original: Outputs, compressed: Outputs, labels: Array | None = None, inputs: Outputs | None = None
) -> Comparison:
    """Compare outputs that are all in memory: ``start``, one ``add``, ``finish``."""
    return finish(add(start(metric), original, compressed, labels=labels, inputs=inputs))


def _known(values: Array | None, rows: int) -> Array:
    """Return the numbers per row, NaN where they are unknown: one unknown row makes the whole unknown."""
    return np.full(rows, np.nan) if values is None else values


def _joined(parts: tuple[Array, ...]) -> Array:
    """Return the numbers of all batches."""
    return np.concatenate(parts) if parts else np.empty(0)


def _total(metric: Metric, values: Array) -> float | None:
    """Return the mean in percent, or for rmse the root of the mean; None where it is unknown."""
    mean = float(values.mean()) if len(values) else math.nan
    if not math.isfinite(mean):
        return None
    return math.sqrt(mean) if metric.name == "rmse" else mean


def _standard_error(metric: Metric, before: Array, after: Array) -> float | None:
    """Return the standard error of the difference of two totals over the same rows; None for a single row.

    The root of a mean is linearised: d sqrt(m) = dm / (2 sqrt(m)).
    """
    if len(before) < 2:
        return None
    if metric.name == "rmse":
        before, after = (each / (2 * math.sqrt(each.mean()) or 1.0) for each in (before, after))
    return float(np.std(after - before, ddof=1) / math.sqrt(len(before)))


def _call(state: State, which: int) -> float | None:
    """Call a custom function on the whole outputs of the original (0) or the compressed model (1)."""
    function = import_callable(state.metric.function, what="metric", error=DataError)
    parts = [(batch[0], batch[1])[which] for batch in state.whole]
    try:
        outputs = {name: np.concatenate([part[name] for part in parts]) for name in state.outputs}
        labels = [batch[2] for batch in state.whole if batch[2] is not None]
        value = float(function(outputs, np.concatenate(labels) if labels else None))
    except Exception as cause:  # the user's function may raise anything
        raise DataError(
            f"metric {state.metric.function} failed: {one_line(cause)}",
            hint="it is called as function(outputs, labels), outputs by name, and returns a number",
        ) from cause
    return value if math.isfinite(value) else None
