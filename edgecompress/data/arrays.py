"""Arrays from .npz files, checked against what a model takes before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompress.data.preprocess import describe_shape
from edgecompress.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from edgecompress.model import TensorSpec

Array = npt.NDArray[Any]

LABELS = "labels"


def read_npz(path: Path, keys: Sequence[str] | None = None) -> dict[str, Array]:
    """Return arrays of an ``.npz`` file: those named ``keys``, or all.

    Objects are never unpickled. Raises ``DataError`` where the file or an array cannot be read or a key is missing.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot read {path}: {reason}", hint="check the path") from error
    except Exception as error:  # a file from outside can make NumPy raise anything
        raise _damaged(path, error) from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(
            f"{path}: a single array, not an .npz file", hint="write it with np.savez(path, INPUT_NAME=array)"
        )
    with archive:
        for key in keys or ():
            if key not in archive.files:
                raise DataError(f"{path}: there is no array {key!r}", hint=did_you_mean(key, archive.files))
        return {key: _read_array(archive, key, path) for key in keys or archive.files}


def _read_array(archive: Any, key: str, path: Path) -> Array:
    """Read one array of an open archive."""
    try:
        array = archive[key]
    except Exception as error:  # a damaged or hostile file can make NumPy and zlib raise anything
        if "pickle" in str(error) or "Object arrays" in str(error):
            raise DataError(
                f"{path}: array {key!r} holds pickled Python objects, which are never loaded",
                hint="save plain numbers: np.savez(path, name=np.asarray(values, np.float32))",
            ) from error
        raise _damaged(path, error) from error
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: {key!r} is not an array", hint="write the file with np.savez")
    return array


def _damaged(path: Path, error: Exception) -> DataError:
    """Build the error for a file that is no readable .npz."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(
        f"{path}: not a readable .npz file ({reason})",
        hint="it may be truncated or of another kind: write it again with np.savez",
    )


def check_names(given: Sequence[str], inputs: Sequence[TensorSpec], where: str) -> None:
    """Raise ``DataError`` where the arrays' names are not exactly the model's input names."""
    expected = [spec.name for spec in inputs]
    for name in given:
        if name not in expected:
            raise DataError(f"{where}: the model has no input {name!r}", hint=did_you_mean(name, [*expected, LABELS]))
    missing = [name for name in expected if name not in given]
    if missing:
        raise DataError(
            f"{where}: no array for the model's input {missing[0]!r}",
            hint=f"it needs one array for each of: {', '.join(expected)}",
        )


def check_rows(arrays: Mapping[str, Array], where: str) -> int:
    """Return the number of rows; raise ``DataError`` where arrays differ in it, have no axis, or are empty."""
    rows: int | None = None
    first = ""
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f"{where}: array {name!r} is a single number", hint="its first axis must be the rows")
        if rows is None:
            rows, first = len(array), name
        if len(array) != rows:
            raise DataError(
                f"{where}: {first!r} has {rows} rows, {name!r} has {len(array)}",
                hint="the first axis of every array, labels too, is the rows: make them equal",
            )
        if array.size == 0:
            shape = ", ".join(map(str, array.shape))
            raise DataError(f"{where}: array {name!r} is empty, shape ({shape})", hint="give at least one row")
    return rows or 0


def check_finite(arrays: Mapping[str, Array], where: str) -> None:
    """Raise ``DataError`` where an array of floats has a NaN or an infinity."""
    for name, array in arrays.items():
        if np.issubdtype(array.dtype, np.inexact):
            finite = np.isfinite(array)
            if not finite.all():
                bad = np.argwhere(~finite)[0]
                raise DataError(
                    f"{where}: array {name!r} has {finite.size - int(finite.sum())} values that are NaN or infinite, "
                    f"the first in row {bad[0]}",
                    hint="remove those rows",
                )


def check_numbers(arrays: Mapping[str, Array], where: str) -> None:
    """Raise ``DataError`` for arrays of text, dates or structures."""
    for name, array in arrays.items():
        if array.dtype.kind not in "biufc" and array.dtype.kind != "V":
            raise DataError(f"{where}: array {name!r} holds {array.dtype}, not numbers", hint="save it as numbers")


def check_feeds(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec], where: str) -> None:
    """Raise ``DataError`` where types or shapes (rows left aside) are not those of the model's inputs."""
    for spec in inputs:
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            raise DataError(
                f"{where}: input {spec.name!r} is {array.dtype}, the model takes {spec.dtype}",
                hint=f"convert it with .astype(np.{spec.dtype})",
            )
        same_rank = array.ndim == len(spec.shape)
        if not same_rank or any(
            size not in (None, given) for size, given in zip(spec.shape[1:], array.shape[1:], strict=True)
        ):
            given = f"({', '.join(['N', *map(str, array.shape[1:])])})"
            raise DataError(
                f"{where}: input {spec.name!r} has shape {given}, the model takes {describe_shape(spec.shape)}",
                hint="the first axis is the rows; the others must be the model's",
            )
