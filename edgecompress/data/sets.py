"""Data sets as values: where rows come from, which of them, in what batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgecompress.data.images import read_pictures
from edgecompress.data.preprocess import PictureShape, Preprocess, apply
from edgecompress.errors import DataError

if TYPE_CHECKING:
    from edgecompress.metrics import Metric
    from edgecompress.model import TensorSpec

Array = npt.NDArray[Any]


class Source(Protocol):
    """Where rows come from."""

    def read(self, rows: Array) -> dict[str, Array]:
        """Return the feeds of the rows with these numbers, first axis = rows, preprocessed."""

    def origins(self, rows: Array) -> set[Hashable]:
        """Return what tells these rows from all others, whichever file they were named in."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Rows of arrays in memory, by model input; ``files`` says where each came from."""

    arrays: Mapping[str, Array]
    files: Mapping[str, tuple[Path, str]]
    steps: Mapping[str, Preprocess]
    dtypes: Mapping[str, np.dtype[Any]]

    def read(self, rows: Array) -> dict[str, Array]:
        """Return the rows as they are, or preprocessed where there are steps for an input."""
        feeds = {}
        for name, array in self.arrays.items():
            values = array[rows]
            steps = self.steps.get(name)
            feeds[name] = values if steps is None else apply(steps, values, self.dtypes[name], f"input {name!r}")
        return feeds

    def origins(self, rows: Array) -> set[Hashable]:
        """Return (file, key, row) of every row and input."""
        return {(file, key, int(row)) for file, key in self.files.values() for row in rows}


@dataclass(frozen=True, eq=False)
class PictureSource:
    """Pictures in files, decoded when they are read."""

    files: tuple[Path, ...]
    input_name: str
    shape: PictureShape
    steps: Preprocess
    dtype: np.dtype[Any]

    def read(self, rows: Array) -> dict[str, Array]:
        """Decode, fit and preprocess the pictures of these rows."""
        pixels = read_pictures([self.files[row] for row in rows], self.shape, self.steps)
        return {self.input_name: apply(self.steps, pixels, self.dtype, f"input {self.input_name!r}")}

    def origins(self, rows: Array) -> set[Hashable]:
        """Return the resolved path of every picture."""
        return {self.files[row].resolve() for row in rows}


@dataclass(frozen=True, eq=False)
class JoinedSource:
    """The rows of several sources, one after the other."""

    parts: tuple[tuple[Source, Array], ...]

    def read(self, rows: Array) -> dict[str, Array]:
        """Read from each part what lies in it and put the rows in the order asked for."""
        ends = np.cumsum([len(index) for _, index in self.parts])
        part_of_row = np.searchsorted(ends, rows, side="right")
        feeds: dict[str, Array] = {}
        for number, (source, index) in enumerate(self.parts):
            places = np.flatnonzero(part_of_row == number)
            if not len(places):
                continue
            for name, values in source.read(index[rows[places] - (ends[number] - len(index))]).items():
                if name not in feeds:
                    feeds[name] = np.empty((len(rows), *values.shape[1:]), values.dtype)
                feeds[name][places] = values
        return feeds

    def origins(self, rows: Array) -> set[Hashable]:
        """Return the origins of all parts' rows that are among ``rows``."""
        found: set[Hashable] = set()
        start = 0
        for source, index in self.parts:
            inside = rows[(rows >= start) & (rows < start + len(index))]
            found |= source.origins(index[inside - start])
            start += len(index)
        return found


@dataclass(frozen=True, eq=False)
class DataSet:
    """Rows to calibrate with or to test on.

    ``index`` holds the row numbers in ``source``; ``labels`` (rows, ...) are in the same order, or None.
    """

    name: str
    source: Source
    index: Array
    labels: Array | None
    metric: Metric

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.index)

    def feeds(self, start: int, stop: int) -> dict[str, Array]:
        """Return rows ``start`` to ``stop`` (exclusive) by input name, preprocessed; pictures are decoded now.

        Raises ``DataError`` where a picture cannot be read.
        """
        return self.source.read(self.index[start:stop])

    def select(self, indices: Sequence[int] | Array | slice) -> DataSet:
        """Return the data set that has only these of the rows, in this order."""
        chosen = indices if isinstance(indices, slice) else np.asarray(indices, np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, index=self.index[chosen], labels=labels)


@dataclass(frozen=True)
class Data:
    """What one path holds: the rows named for calibration, those named for tests, and all; None where not named."""

    path: Path
    calibration: DataSet | None
    test: DataSet | None
    all: DataSet | None


def join(name: str, sets: Sequence[DataSet]) -> DataSet:
    """Return one data set of all rows of several that have the same inputs; labels only where all have them."""
    if len(sets) == 1:
        return replace(sets[0], name=name)
    parts = tuple((each.source, each.index) for each in sets)
    labels = [each.labels for each in sets if each.labels is not None]
    rows = sum(each.rows for each in sets)
    joined = np.concatenate(labels) if len(labels) == len(sets) else None
    return DataSet(name, JoinedSource(parts), np.arange(rows), joined, sets[-1].metric)


def refuse_overlap(calibration: DataSet | None, test: DataSet | None, where: str) -> None:
    """Raise ``DataError`` where a row is in both sets."""
    if calibration is None or test is None:
        return
    shared = calibration.source.origins(calibration.index) & test.source.origins(test.index)
    if shared:
        raise DataError(
            f"{where}: {len(shared)} rows are in both the calibration and the test set",
            hint="calibration and test rows never overlap: give each its own rows, keys or files",
        )


def fixed_batch(inputs: Sequence[TensorSpec]) -> int | None:
    """Return the number of rows that every run of a model takes, None where it is free.

    Raises ``DataError`` where inputs disagree, or have no axes at all, so that rows cannot be told.
    """
    sizes: dict[int, str] = {}
    for spec in inputs:
        if not spec.shape:
            raise DataError(
                f"input {spec.name!r} is a scalar: it has no axis of rows",
                hint="make it a constant of the model, then give data for the other inputs",
            )
        if spec.shape[0] is not None:
            sizes.setdefault(spec.shape[0], spec.name)
    if len(sizes) > 1:
        named = ", ".join(f"{name!r} {size}" for size, name in sorted(sizes.items()))
        raise DataError(
            f"the inputs have different fixed leading dimensions ({named}): their first axes cannot all be rows",
            hint="run without --data, or export the model with the batch as the first axis of every input",
        )
    return next(iter(sizes), None)


def rows_used(rows: int, inputs: Sequence[TensorSpec]) -> tuple[int, int]:
    """Return (rows that ``batches`` gives, rows that it leaves out because they do not fill a fixed batch)."""
    size = fixed_batch(inputs)
    left_out = rows % size if size else 0
    return rows - left_out, left_out


def batches(
    dataset: DataSet, inputs: Sequence[TensorSpec], batch_size: int
) -> Iterator[tuple[slice, dict[str, Array]]]:
    """Yield (which rows, their feeds) in order: ``batch_size`` rows, or exactly as many as the model's fixed batch has.

    ``rows_used`` tells how many rows at the end do not fill a fixed batch and are left out.
    Raises ``DataError`` where there are fewer rows than one fixed batch.
    """
    fixed = fixed_batch(inputs)
    used, _ = rows_used(dataset.rows, inputs)
    if not used:
        raise DataError(
            f"{dataset.name}: {dataset.rows} rows, but the model takes exactly {fixed} at a time",
            hint=f"give at least {fixed} rows, or export the model with a free batch dimension",
        )
    step = fixed or batch_size
    for start in range(0, used, step):
        stop = min(start + step, used)
        yield slice(start, stop), dataset.feeds(start, stop)
