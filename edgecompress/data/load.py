"""Read a data set of any kind and decide which rows calibrate and which test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompress.data import arrays as checks
from edgecompress.data.description import DATASET_FILE, read_description, steps_by_input
from edgecompress.data.images import Pictures, list_pictures
from edgecompress.data.preprocess import Preprocess, picture_shape
from edgecompress.data.sets import (
    ArraySource,
    Data,
    DataSet,
    PictureSource,
    fixed_batch,
    join,
    refuse_overlap,
)
from edgecompress.errors import DataError
from edgecompress.metrics import AUTO, Metric, check_labels

if TYPE_CHECKING:
    from edgecompress.data.description import Description, Part
    from edgecompress.model import TensorSpec

Array = npt.NDArray[Any]

MAX_TEST_ROWS = 1_000
TABLE = "labels.csv"


def load_data(path: Path, inputs: Sequence[TensorSpec]) -> Data:
    """Read an ``.npz``, a folder of pictures, a folder with a ``dataset.toml``, or such a file, for a model's inputs.

    Everything that can be checked without decoding every picture is checked now.
    Raises ``DataError`` (exit 3) naming what does not fit.
    """
    path = _definition(path)
    if path.suffix == ".toml":
        return _from_description(path, read_description(path), inputs)
    if path.is_dir():
        return _from_folder(path, inputs)
    where = str(path)
    arrays = checks.read_npz(path)
    labels = arrays.pop(checks.LABELS, None) if all(spec.name != checks.LABELS for spec in inputs) else None
    checks.check_names(list(arrays), inputs, where)
    files = {name: (path.resolve(), name) for name in arrays}
    source = ArraySource(arrays, files, {}, {spec.name: np.dtype(spec.dtype) for spec in inputs})
    return Data(path, None, None, _array_set(source, labels, AUTO, inputs, where))


def split(data: Path, test_data: Path | None, inputs: Sequence[TensorSpec]) -> tuple[DataSet | None, DataSet | None]:
    """Return the (calibration, test) sets that ``compress`` uses.

    With both paths all rows of ``data`` calibrate and all of ``test_data`` test. With ``data`` alone, the splits that
    it names, or else the last fifth of its rows tests (at most 1,000, at least 1 or one fixed batch) and the rest
    calibrates. Raises ``DataError`` as ``load_data`` does, and where a row would do both.
    """
    first = load_data(data, inputs)
    if test_data is not None:
        if _definition(data).resolve() == _definition(test_data).resolve():
            raise DataError(
                f"{data} is given both as the data and as the test data",
                hint="calibration and test rows never overlap: leave --test-data out and the last fifth tests",
            )
        second = load_data(test_data, inputs)
        refuse_overlap(first.all, second.all, f"{data} and {test_data}")
        return first.all, second.all
    if first.calibration is not None or first.test is not None:
        return first.calibration, first.test
    if first.all is None or first.all.rows < 2:
        raise DataError(
            f"{data}: one row cannot both calibrate and test", hint="give at least 2 rows, better some hundreds"
        )
    rows = first.all.rows
    tests = min(max(min(rows // 5, MAX_TEST_ROWS), fixed_batch(inputs) or 1), rows - 1)
    calibration, test = first.all.select(slice(0, rows - tests)), first.all.select(slice(rows - tests, rows))
    return replace(calibration, name=f"{first.all.name} (first rows)"), replace(
        test, name=f"{first.all.name} (last rows)"
    )


def for_validation(path: Path, inputs: Sequence[TensorSpec]) -> DataSet:
    """Return the rows that ``validate`` uses: the test split where one is named, else all rows.

    Raises ``DataError`` as ``load_data`` does, and where rows are named for calibration only.
    """
    data = load_data(path, inputs)
    if data.test is not None:
        return data.test
    if data.all is None or data.calibration is not None:
        raise DataError(f"{path}: it names rows for calibration only", hint="add a [test] table that names other rows")
    return data.all


def _definition(path: Path) -> Path:
    """Return the file that defines a data set, or the folder of pictures."""
    if path.is_dir():
        return path / DATASET_FILE if (path / DATASET_FILE).is_file() else path
    if not path.exists():
        raise DataError(f"{path} does not exist", hint="give an .npz, a folder of pictures or a dataset.toml")
    if path.suffix not in (".npz", ".toml"):
        raise DataError(
            f"{path}: not a kind of data set",
            hint="give an .npz (np.savez(path, INPUT_NAME=array)), a folder of pictures or a dataset.toml",
        )
    return path


def _from_folder(folder: Path, inputs: Sequence[TensorSpec]) -> Data:
    """Read a plain folder of pictures: scaled to cover the input's size, cropped to its centre, 0 to 1."""
    table = folder / TABLE
    pictures = list_pictures(folder, table if table.is_file() else None, complete=True)
    spec = _only_input(inputs, str(folder))
    scale = 1 / 255 if np.issubdtype(spec.dtype, np.floating) else None
    steps = Preprocess(resize="cover", crop="centre", scale=scale)
    everything = _picture_set(pictures, steps, AUTO, spec, str(folder))
    calibration, test = (_by_split(everything, pictures.splits, name) for name in ("calibration", "test"))
    return Data(folder, calibration, test, everything)


def _by_split(everything: DataSet, splits: tuple[str, ...] | None, value: str) -> DataSet | None:
    """Return the rows whose split column has this value, None where there are none."""
    chosen = [row for row, split in enumerate(splits or ()) if split == value]
    return replace(everything.select(chosen), name=f"{everything.name} ({value})") if chosen else None


def _from_description(path: Path, description: Description, inputs: Sequence[TensorSpec]) -> Data:
    """Read the arrays or pictures that a dataset.toml names."""
    sets: dict[str, DataSet | None] = {}
    for name in ("calibration", "test"):
        part = description.parts.get(name)
        sets[name] = None if part is None else _read_part(part, description, inputs, f"{path} [{name}]")
    if description.parts:
        named = [each for each in sets.values() if each is not None]
        everything = join(description.name, named)
    else:
        everything = _read_part(description.whole, description, inputs, str(path))
        if isinstance(everything.source, PictureSource):
            pictures = _pictures(description.whole)
            sets = {name: _by_split(everything, pictures.splits, name) for name in sets}
    refuse_overlap(sets["calibration"], sets["test"], str(path))
    named_sets = {
        name: None if each is None else replace(each, name=f"{description.name} ({name})")
        for name, each in sets.items()
    }
    return Data(path, named_sets["calibration"], named_sets["test"], replace(everything, name=description.name))


def _read_part(part: Part, description: Description, inputs: Sequence[TensorSpec], where: str) -> DataSet:
    """Read one table of a dataset.toml: the whole, or a split."""
    if part.images is not None:
        pictures = _pictures(part)
        spec = _only_input(inputs, where)
        steps = steps_by_input(description, inputs, where).get(spec.name, Preprocess())
        found = _picture_set(pictures, steps, description.metric, spec, where)
        splits = pictures.splits
    else:
        found = _read_arrays(part, description, inputs, where)
        splits = None
    if part.split is not None:
        if splits is None or part.split not in splits:
            known = ", ".join(sorted(set(splits or ()))) or "there is no column 'split'"
            raise DataError(f"{where}: no line has split {part.split!r}", hint=f"found: {known}")
        found = found.select([row for row, split in enumerate(splits) if split == part.split])
    if part.rows is not None:
        start, stop = part.rows
        if stop > found.rows:
            raise DataError(
                f"{where}: rows = [{start}, {stop}], but there are only {found.rows}", hint="the end is exclusive"
            )
        found = found.select(slice(start, stop))
    return found


def _pictures(part: Part) -> Pictures:
    """List the pictures that a table of a dataset.toml names."""
    assert part.images is not None
    return list_pictures(part.images, part.labels_table, complete=False)


def _read_arrays(part: Part, description: Description, inputs: Sequence[TensorSpec], where: str) -> DataSet:
    """Read the arrays that a table of a dataset.toml names."""
    if part.arrays is None:
        raise DataError(
            f"{where}: neither arrays nor images is named", hint='add arrays = "data.npz" or images = "folder"'
        )
    keys = part.inputs if part.inputs is not None else {spec.name: spec.name for spec in inputs}
    if isinstance(keys, str):
        keys = {_only_input(inputs, where).name: keys}
    checks.check_names(list(keys), inputs, where)
    wanted = [*keys.values(), *([part.labels_key] if part.labels_key else [])]
    stored = checks.read_npz(part.arrays, wanted)
    labels = stored[part.labels_key] if part.labels_key else None
    file = part.arrays.resolve()
    steps = steps_by_input(description, inputs, where)
    source = ArraySource(
        {name: stored[key] for name, key in keys.items()},
        {name: (file, key) for name, key in keys.items()},
        steps,
        {spec.name: np.dtype(spec.dtype) for spec in inputs},
    )
    return _array_set(source, labels, description.metric, inputs, where)


def _array_set(
    source: ArraySource, labels: Array | None, metric: Metric, inputs: Sequence[TensorSpec], where: str
) -> DataSet:
    """Check arrays and labels and make them a data set."""
    every = dict(source.arrays) if labels is None else {**source.arrays, checks.LABELS: labels}
    checks.check_numbers(every, where)
    rows = checks.check_rows(every, where)
    checks.check_finite(every, where)
    checks.check_feeds(source.read(np.arange(1)), inputs, where)
    check_labels(metric, labels, where)
    return DataSet(Path(where).name, source, np.arange(rows), labels, metric)


def _picture_set(pictures: Pictures, steps: Preprocess, metric: Metric, spec: TensorSpec, where: str) -> DataSet:
    """Decode the first picture, check it and the labels, and make the pictures a data set."""
    shape = picture_shape(spec, steps)
    dtype = np.dtype(spec.dtype)
    source = PictureSource(pictures.files, spec.name, shape, replace(steps, layout=shape.layout), dtype)
    checks.check_feeds(source.read(np.arange(1)), [spec], where)
    check_labels(metric, pictures.labels, where)
    return DataSet(Path(where).name, source, np.arange(len(pictures.files)), pictures.labels, metric)


def _only_input(inputs: Sequence[TensorSpec], where: str) -> TensorSpec:
    """Return the model's only input; raise ``DataError`` where it has several."""
    if len(inputs) != 1:
        names = ", ".join(spec.name for spec in inputs)
        raise DataError(
            f"{where}: the model has {len(inputs)} inputs ({names}), so it must be said which is which",
            hint="give an .npz with one array for each, or name them under [inputs] in a dataset.toml",
        )
    return inputs[0]
