"""Sorting the runs of a tensor by how large their values are: rows and columns of one layer often differ in scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgecompress.runtime.layout import CLASS_BIAS, MAX_CLASS_LEVEL, ClassMap

Array = npt.NDArray[Any]

_ROUNDS = 4
_COLUMN_COST = 2.0  # bits for each step of a column from the usual level, so that few columns take one


def fit_classes(values: Array, classes: int) -> tuple[ClassMap, Array]:
    """Return a map of (rows, columns, run) uint8 ``values`` to ``classes``, and the class of every run.

    Rows and columns get the levels for which the values take least, if each class is coded with its own distribution;
    alternately, from levels by the mean distance to the most frequent value.
    """
    counts = np.bincount(values.reshape(-1), minlength=256)
    distance = np.abs(values.astype(np.int16) - int(counts.argmax())).mean(axis=2)
    rows = np.clip(_log_steps(distance.mean(axis=1)) + classes // 2, 0, classes - 1)
    columns = np.clip(_log_steps(distance.mean(axis=0)), 1 - classes, classes - 1)
    steps = np.arange(1 - classes, classes)
    for _ in range(_ROUNDS):
        costs = _class_costs(values, _classes(rows, columns, classes), classes)
        by_row = [_picked(costs, np.clip(row + columns, 0, classes - 1)).sum(axis=1) for row in range(classes)]
        rows = np.argmin(by_row, axis=0)
        turned = costs.transpose(1, 0, 2)
        by_column = [
            _picked(turned, np.clip(step + rows, 0, classes - 1)).sum(axis=1) + _COLUMN_COST * abs(step)
            for step in steps
        ]
        columns = steps[np.argmin(by_column, axis=0)]
    levels = (columns + CLASS_BIAS).astype(np.uint8)
    assert int(levels.max(initial=0)) <= MAX_CLASS_LEVEL
    return ClassMap(classes, rows.astype(np.uint8).tobytes(), levels.tobytes()), _classes(rows, columns, classes)


def _log_steps(sizes: Array) -> Array:
    """Return how many half octaves each of ``sizes`` is above the middle one."""
    logs = np.log2(sizes / max(float(sizes.mean()), 1e-9) + 0.05)
    steps: Array = np.rint(2 * (logs - np.median(logs))).astype(np.int64)
    return steps


def _classes(rows: Array, columns: Array, classes: int) -> Array:
    """Return the class of every run, (rows, columns)."""
    found: Array = np.clip(rows[:, np.newaxis] + columns, 0, classes - 1)
    return found


def _class_costs(values: Array, found: Array, classes: int) -> Array:
    """Return what each run would take in each class, (rows, columns, classes) float32 bits."""
    counts = np.stack([np.bincount(values[found == number].reshape(-1), minlength=256) for number in range(classes)])
    shares = counts + 0.5 * counts.sum(axis=0) / values.size + 1e-3  # a class must not forbid what it lacks
    bits = np.log2(shares.sum(axis=1, keepdims=True) / shares).astype(np.float32)
    return np.stack([bits[number][values].sum(axis=2) for number in range(classes)], axis=2)


def _picked(costs: Array, chosen: Array) -> Array:
    """Return for every row and column the cost of the class that ``chosen`` has for the column."""
    return costs[:, np.arange(chosen.size), chosen]
