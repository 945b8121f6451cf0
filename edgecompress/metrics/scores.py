"""A number per row: right or wrong, the share of positions that agree, the squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError
from edgecompress.metrics.definition import Metric, check_labels, class_axis, first_float

Array = npt.NDArray[Any]
Outputs = Mapping[str, Array]


def score(
    metric: Metric,
    outputs: Outputs,
    *,
    reference: Outputs | None = None,
    labels: Array | None = None,
    inputs: Outputs | None = None,
) -> Array | None:
    """Return a float64 number per row: 0 or 100 (top1, topk), percent of positions (agreement), squared error (rmse).

    None where the metric has no value for these outputs. ``reference`` has the original's outputs, for agreement.
    Raises ``DataError`` where labels do not fit the outputs.
    """
    name = first_float(reference if metric.name == "agreement" and reference is not None else outputs)
    if name is None:
        return None
    values = outputs[name]
    if metric.name == "agreement":
        return None if reference is None else agreement(reference[name], values, count_rows(outputs, labels, inputs))
    if metric.name in ("top1", "topk"):
        return _top(metric, values, labels, name)
    if metric.name == "rmse":
        return _squared_error(values, labels, inputs, name)
    raise ValueError(f"metric {metric.name} has no number per row")


def count_rows(outputs: Outputs, labels: Array | None, inputs: Outputs | None) -> int:
    """Return the number of rows of a batch: that of its labels or inputs, else of the first output."""
    if labels is not None:
        return len(labels)
    for arrays in (inputs or {}, outputs):
        for values in arrays.values():
            if isinstance(values, np.ndarray) and values.ndim:
                return len(values)
    return 1


def agreement(original: Array, compressed: Array, rows: int) -> Array | None:
    """Return the percentage of positions of each row where the argmax over the last axis is the same.

    None where that axis has one element, or is the axis of rows. Where the output's first axis is not the rows, every
    row gets the batch's percentage. NaN in ``compressed`` does not agree, nor does any position of another shape.
    """
    if original.ndim < 2 or original.shape[-1] < 2 or not original.size:
        return None
    if original.shape != compressed.shape:
        return np.zeros(rows)
    same = np.argmax(original, axis=-1) == np.argmax(compressed, axis=-1)
    same &= ~np.isnan(compressed).any(axis=-1)
    if len(same) != rows:
        return np.full(rows, 100.0 * same.mean())
    return np.asarray(100.0 * same.reshape(rows, -1).mean(axis=1))


def _top(metric: Metric, values: Array, labels: Array | None, name: str) -> Array:
    """Return 100 for each row whose label is among the k largest values, ties going to the smaller class number."""
    check_labels(metric, labels, "the data set")
    assert labels is not None
    if not class_axis(values.shape) or len(values) != len(labels):
        shape = ", ".join(map(str, values.shape))
        raise DataError(
            f"metric {metric.title} needs an output of shape ({len(labels)}, classes), {name!r} has ({shape})",
            hint='use metric = "agreement", or one of your own as package.module:function',
        )
    values = values.reshape(len(values), -1)
    classes = values.shape[1]
    if metric.k >= classes:
        raise DataError(f"metric {metric.title} of {classes} classes is always 100 %", hint="choose a smaller k")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"label {wrong[0]} is not a class of output {name!r}, which has {classes}: 0 to {classes - 1}",
            hint="count classes from 0 in the order of the model's output",
        )
    own = values[np.arange(len(values)), labels][:, np.newaxis]
    earlier = np.arange(classes) < labels[:, np.newaxis]
    rank = ((values > own) | ((values == own) & earlier)).sum(axis=1)
    # a NaN compares false with everything and would count as the best rank
    return np.asarray(100.0 * ((rank < metric.k) & ~np.isnan(values).any(axis=1)))


def _squared_error(values: Array, labels: Array | None, inputs: Outputs | None, name: str) -> Array:
    """Return each row's mean squared error to the labels, or else to the first input of the output's shape."""
    target = labels
    if labels is None:
        target = next((each for each in (inputs or {}).values() if each.shape == values.shape), None)
    elif labels.size == values.size and len(labels) == len(values):
        target = labels.reshape(values.shape)
    if target is None or target.shape != values.shape:
        given = "no input" if target is None else f"labels of shape {target.shape}"
        raise DataError(
            f"metric rmse: output {name!r} has shape {values.shape}, there are {given} to compare it with",
            hint="rmse compares with labels of the output's shape, or without labels with an input of that shape",
        )
    difference = values.astype(np.float64) - target.astype(np.float64)
    return np.asarray((difference**2).reshape(len(values), -1).mean(axis=1))
