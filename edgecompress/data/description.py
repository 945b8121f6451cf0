"""dataset.toml: where arrays or pictures are, how to preprocess them, which rows calibrate and test, and the metric."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgecompress.data.preprocess import Preprocess
from edgecompress.data.values import READERS, known, text, wrong
from edgecompress.errors import DataError, did_you_mean
from edgecompress.metrics import AUTO, Metric, parse_metric

if TYPE_CHECKING:
    from edgecompress.model import TensorSpec

DATASET_FILE = "dataset.toml"

_PLACE = ("arrays", "images", "inputs", "labels")
_TOP = ("name", "root", "metric", "k", *_PLACE, "preprocess", "calibration", "test")
_PART = (*_PLACE, "rows", "split")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Where some rows are: arrays of an ``.npz`` or pictures of a folder, and which of them.

    ``inputs`` is the key of the only input's array, or a key by input name; None means the inputs' own names.
    """

    arrays: Path | None = None
    images: Path | None = None
    inputs: str | Mapping[str, str] | None = None
    labels_key: str | None = None
    labels_table: Path | None = None
    rows: tuple[int, int] | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Description:
    """A dataset.toml that has been read and checked as far as possible without a model."""

    name: str
    metric: Metric
    whole: Part
    parts: Mapping[str, Part]
    preprocess: Preprocess | Mapping[str, Preprocess] | None


def read_description(path: Path) -> Description:
    """Read a dataset.toml. Raises ``DataError`` for one that is unreadable, or a key or value that is not allowed."""
    try:
        with path.open("rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not valid TOML: {error}", hint="docs/data.md has complete examples") from error
    where = str(path)
    known(table, _TOP, where)
    metric, k = table.get("metric"), table.get("k")
    if "k" in table and metric != "topk":
        raise DataError(f'{where}: k is for metric = "topk" only, metric is {metric!r}', hint="remove k")
    root = _root(path, table.get("root", "."), where)
    return Description(
        name=text(table.get("name", path.resolve().parent.name), "name", where),
        metric=AUTO if metric is None else parse_metric(metric, k, where),
        whole=_part(table, {}, root, where),
        parts={name: _split(table, name, root, where) for name in ("calibration", "test") if name in table},
        preprocess=_preprocess(table.get("preprocess"), where),
    )


def steps_by_input(description: Description, inputs: Sequence[TensorSpec], where: str) -> dict[str, Preprocess]:
    """Return the preprocessing of each input that has one.

    Raises ``DataError`` where it names an input that the model has not, or does not say which of several it is for.
    """
    steps = description.preprocess
    if steps is None:
        return {}
    names = [spec.name for spec in inputs]
    if isinstance(steps, Preprocess):
        if len(names) == 1:
            return {names[0]: steps}
        raise DataError(
            f"{where}: [preprocess] does not say for which of the model's {len(names)} inputs it is",
            hint=f"write [preprocess.{names[0]}] and one such table for each input that needs it",
        )
    for name in steps:
        if name not in names:
            raise DataError(
                f"{where}: [preprocess.{name}]: the model has no such input", hint=did_you_mean(name, names)
            )
    return dict(steps)


def _root(path: Path, root: Any, where: str) -> Path:
    """Return the folder that paths are relative to; ``${NAME}`` in it is an environment variable."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise DataError(f"{where}: root needs the environment variable {name}", hint=f"export {name}=FOLDER")
        return os.environ[name]

    return path.parent / re.sub(r"\$\{(\w+)\}", value, text(root, "root", where))


def _split(table: Mapping[str, Any], name: str, root: Path, where: str) -> Part:
    """Read [calibration] or [test]: its own keys, and those at the top where it has none."""
    own = table[name]
    if not isinstance(own, dict):
        raise wrong(where, name, own, f"a table: [{name}]")
    where = f"{where} [{name}]"
    known(own, _PART, where)
    return _part(own, table, root, where)


def _part(own: Mapping[str, Any], above: Mapping[str, Any], root: Path, where: str) -> Part:
    """Read the keys that say where rows are."""
    if "arrays" in own and "images" in own:
        raise DataError(
            f"{where}: both arrays and images are named", hint="rows come from one of them: remove the other"
        )
    if "images" in own or ("images" in above and "arrays" not in own):
        return _pictures_part(own, above, root, where)
    found = {key: own.get(key, above.get(key)) for key in _PLACE}
    if "split" in own:
        raise DataError(
            f"{where}: split chooses lines of the pictures' labels.csv, arrays have none",
            hint="use rows = [start, stop]",
        )
    inputs = found["inputs"]
    by_name = isinstance(inputs, dict) and all(isinstance(key, str) for key in inputs.values())
    if not (inputs is None or isinstance(inputs, str) or by_name):
        raise wrong(where, "inputs", inputs, 'the name of an array, or a table: { INPUT = "array" }')
    return Part(
        arrays=None if found["arrays"] is None else root / text(found["arrays"], "arrays", where),
        inputs=inputs,
        labels_key=None if found["labels"] is None else text(found["labels"], "labels", where),
        rows=_rows(own, where),
    )


def _pictures_part(own: Mapping[str, Any], above: Mapping[str, Any], root: Path, where: str) -> Part:
    """Read the keys that say where pictures are; ``labels.csv`` in their folder is used where no other is named."""
    if "inputs" in own or "inputs" in above:
        raise DataError(f"{where}: inputs names arrays, but the rows are pictures", hint="remove inputs")
    folder = root / text(own.get("images", above.get("images")), "images", where)
    labels = own.get("labels", above.get("labels"))
    table = folder / "labels.csv" if labels is None else root / text(labels, "labels", where)
    return Part(
        images=folder,
        labels_table=table if labels is not None or table.is_file() else None,
        rows=_rows(own, where),
        split=text(own["split"], "split", where) if "split" in own else None,
    )


def _rows(own: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    """Read rows = [start, stop]."""
    rows = own.get("rows")
    if rows is None:
        return None
    whole = isinstance(rows, list) and len(rows) == 2 and all(type(each) is int for each in rows)
    if not whole or not 0 <= rows[0] < rows[1]:
        raise wrong(where, "rows", rows, "[start, stop] with 0 <= start < stop, stop exclusive")
    return rows[0], rows[1]


def _preprocess(table: Any, where: str) -> Preprocess | dict[str, Preprocess] | None:
    """Read [preprocess], or one [preprocess.INPUT] for each input."""
    if table is None:
        return None
    if not isinstance(table, dict):
        raise wrong(where, "preprocess", table, "a table: [preprocess]")
    if table and all(isinstance(value, dict) for value in table.values()):
        return {name: _steps(value, f"{where} [preprocess.{name}]") for name, value in table.items()}
    return _steps(table, f"{where} [preprocess]")


def _steps(table: Mapping[str, Any], where: str) -> Preprocess:
    """Read the keys of one preprocessing."""
    known(table, [field.name for field in fields(Preprocess)], where)
    steps = Preprocess(**{key: READERS[key](value, key, where) for key, value in table.items()})
    if steps.binarize is not None and steps.scale is not None:
        raise DataError(f"{where}: binarize gives 0 and 1, scale has nothing to do after it", hint="remove one of them")
    if 0.0 in steps.std:
        raise DataError(f"{where}: std has a zero", hint="a column that never changes takes std 1")
    if steps.resize is not None and steps.crop == "none":
        raise DataError(
            f'{where}: resize without crop = "centre"',
            hint='without a crop, pictures are resized to size itself: remove resize, or add crop = "centre"',
        )
    return steps
