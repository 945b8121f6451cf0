"""Build the data sets that ship with the project, byte for byte the same on every run, from scikit-learn's copies.

    python calibration/build.py [FOLDER]

FOLDER is where digits/digits.npz and wine/wine.npz go: this folder by default.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits, load_wine

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip file can hold: a real one would change the bytes


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what np.savez_compressed writes, without the date and the permissions of the moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=EPOCH)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, buffer.getvalue(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)


def shuffled(rows: int) -> np.ndarray:
    """Return row numbers in a fixed random order (RandomState's stream never changes between NumPy versions)."""
    return np.random.RandomState(0).permutation(rows)


def build(folder: Path) -> None:
    """Write both data sets below ``folder``."""
    digits = load_digits()
    order = shuffled(len(digits.target))
    images = digits.images[order].astype(np.uint8)  # 8 x 8 counts from 0 to 16
    write_npz(folder / "digits" / "digits.npz", {"images": images, "labels": digits.target[order].astype(np.uint8)})

    wine = load_wine()
    order = shuffled(len(wine.target))  # the table is sorted by class
    table = wine.data[order].astype(np.float32)
    write_npz(folder / "wine" / "wine.npz", {"measurements": table, "labels": wine.target[order].astype(np.uint8)})


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
