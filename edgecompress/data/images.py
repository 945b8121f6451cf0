"""Pictures in folders: which files, their labels, and how they are decoded."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image

    from edgecompress.data.preprocess import PictureShape, Preprocess

Array = npt.NDArray[Any]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow converts pixels of 16 bits and floats to 8 bits by cutting them off: those are refused
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_COLUMNS = ("file", "label", "split")


@dataclass(frozen=True, eq=False)
class Pictures:
    """Files of a folder in order, with their labels and the value of their ``split`` column where there are any."""

    files: tuple[Path, ...]
    labels: Array | None
    splits: tuple[str, ...] | None


def list_pictures(folder: Path, table: Path | None, *, complete: bool) -> Pictures:
    """List a folder's pictures by name, or those that a CSV file (columns file, label, split) names, in its order.

    With ``complete`` every picture of the folder must be in the CSV file. Only the header of each picture is read.
    Raises ``DataError`` for a missing or empty folder, files that are missing or no pictures, and a bad CSV file.
    """
    try:
        present = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}", hint="check the path") from error
    if table is None:
        found = Pictures(tuple(present), None, None)
    else:
        found = _read_table(folder, table)
        unlabelled = sorted(set(present) - set(found.files))
        if complete and unlabelled:
            raise DataError(
                f"{table}: {len(unlabelled)} pictures of the folder have no label, the first is {unlabelled[0].name}",
                hint="add a line for each, or move them out of the folder",
            )
    if not found.files:
        raise DataError(
            f"no pictures in {folder}",
            hint=f"a folder of pictures holds files that end in {', '.join(SUFFIXES)}",
        )
    for path in found.files:
        _open(path).close()
    return found


def _read_table(folder: Path, table: Path) -> Pictures:
    """Read a CSV file of pictures."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = tuple(reader.fieldnames or ())
            lines = [(reader.line_num, line) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {table}: {error}", hint="it must be a CSV file in UTF-8") from error
    for column in columns:
        if column not in _COLUMNS:
            raise DataError(f"{table}: unknown column {column!r}", hint=did_you_mean(str(column), _COLUMNS))
    if "file" not in columns:
        raise DataError(
            f"{table}: there is no column 'file'", hint="the first line must read file,label or file,label,split"
        )
    files: list[Path] = []
    labels: list[int | float] = []
    for number, line in lines:
        if None in line or None in line.values():
            raise DataError(f"{table}, line {number}: it has not {len(columns)} fields", hint="one line: file,label")
        files.append(_existing(folder / line["file"], table, number))
        if "label" in columns:
            labels.append(_label(line["label"], table, number))
    twice = len(files) - len(set(files))
    if twice:
        raise DataError(f"{table}: {twice} files are listed twice", hint="keep one line for each file")
    splits = tuple(line["split"] for _, line in lines) if "split" in columns else None
    return Pictures(tuple(files), np.asarray(labels) if labels else None, splits)


def _existing(path: Path, table: Path, number: int) -> Path:
    """Return ``path`` if it is a file."""
    if not path.is_file():
        raise DataError(
            f"{table}, line {number}: {path} does not exist", hint="names are relative to the pictures' folder"
        )
    return path


def _label(text: str, table: Path, number: int) -> int | float:
    """Read a label: a class number, or any finite number for rmse."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if np.isfinite(value) and abs(value) < 2**63:
            return value
    raise DataError(
        f"{table}, line {number}: label {text!r} is not a number",
        hint="a label is the number of the class, counted from 0 in the order of the model's output",
    )


def read_pictures(files: Sequence[Path], shape: PictureShape, steps: Preprocess) -> Array:
    """Decode pictures to (rows, height, width, channels) uint8 of the size that ``shape`` gives.

    Raises ``DataError`` naming the picture that cannot be decoded or is too small for its crop.
    """
    pixels = np.empty((len(files), *shape.size, shape.channels), np.uint8)
    for row, path in enumerate(files):
        with _open(path) as picture:
            if picture.mode not in _MODES:
                raise DataError(
                    f"{path}: pixels of kind {picture.mode}, 8 bits a channel are needed",
                    hint="convert the file, or give the pixels as arrays in an .npz with a dataset.toml",
                )
            try:
                plain = picture.convert("RGB" if shape.channels == 3 else "L")
            except Exception as error:  # Pillow's decoders raise many kinds on damaged files
                raise _unreadable(path, error) from error
            fitted = _fit(plain, path, shape.size, steps)
            pixels[row] = np.asarray(fitted).reshape(*shape.size, shape.channels)
    return pixels


def _fit(picture: Image, path: Path, size: tuple[int, int], steps: Preprocess) -> Image:
    """Resize (bilinear) and crop a picture to ``size`` (height, width)."""
    from PIL.Image import Resampling

    height, width = size
    if steps.resize is not None:
        shorter = min(picture.size)
        if steps.resize == "cover":
            factor = max(width / picture.width, height / picture.height)
        else:
            factor = steps.resize / shorter
        scaled = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
        picture = picture.resize(scaled, Resampling.BILINEAR)
    if steps.crop == "centre":
        if picture.width < width or picture.height < height:
            raise DataError(
                f"{path}: {picture.width} x {picture.height} pixels are too few for a crop of {width} x {height}",
                hint='add resize = "cover" under [preprocess]',
            )
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))
    return picture if picture.size == (width, height) else picture.resize((width, height), Resampling.BILINEAR)


def _open(path: Path) -> Image:
    """Open a picture: its header is read, its pixels are not yet."""
    from PIL import Image

    try:
        return Image.open(path)
    except Exception as error:  # Pillow raises many kinds on damaged files
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    """Build the error for a picture that cannot be decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"{path}: not a readable picture ({reason})", hint="replace the file or move it out of the folder")
