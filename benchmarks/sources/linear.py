"""Part 1 of "Understanding Compression of Convolutional Neural Nets": truncated SVD of a matrix, data and a photo."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgecompress.factorize.svd import plain_svd, spectrum
from sources.pictures import grid, scatter, write
from sources.tables import Options, Table

Array = NDArray[Any]

TITLE = 'Part 1 of "Understanding Compression of Convolutional Neural Nets"'

EXAMPLE = np.array([[6.0, 6.0, 2.0], [0.0, 1.0, 3.0], [4.0, 0.0, 1.0], [0.0, 6.0, 2.0]])
_PHOTO = (
    "Two factors of rank r hold r (height + width) values per colour channel. Level and upright edges survive; "
    "slanted and fine structure is lost first."
)

HEADERS = ("what", "published", "ours", "why they differ")


def sections(options: Options) -> Iterator[Table]:
    """Yield the tables of this source; pictures go to ``options.pictures``."""
    yield example()
    yield iris(options)
    yield photo(options)


def squared_error(matrix: Array, rank: int) -> float:
    """Return the squared Frobenius error of the best approximation of a rank."""
    return float(np.sum((matrix - plain_svd(matrix, rank).to_dense()) ** 2))


def example() -> Table:
    values = spectrum(EXAMPLE)
    squares = values**2
    shown = ", ".join(f"{value:.2f}" for value in values)
    rows = (
        ("singular values", "10.51, 5.06, 2.63", shown, "they agree"),
        ("squared error of rank 2", "6.9048", f"{squared_error(EXAMPLE, 2):.4f}", f"= {values[2]:.4f}^2"),
        (
            "squared error of rank 1",
            "the sum of the two squares",
            f"{squared_error(EXAMPLE, 1):.4f}",
            f"= {squares[1]:.4f} + {squares[2]:.4f}",
        ),
    )
    return Table(HEADERS, rows, "The 4 x 3 example", "The matrix [[6, 6, 2], [0, 1, 3], [4, 0, 1], [0, 6, 2]].")


def iris(options: Options) -> Table:
    """Reduce the flowers to the two leading directions of the centred data."""
    from sklearn.datasets import load_iris

    flowers = load_iris()
    centred = flowers.data - flowers.data.mean(axis=0)
    form = plain_svd(centred, 2)
    lengths = np.linalg.norm(form.right, axis=1)  # the factors share the singular values: undo it
    points = form.left * lengths
    energy = 100 * (1 - squared_error(centred, 2) / np.sum(centred**2))
    picture = ""
    if options.pictures is not None:
        groups = [(str(name), points[flowers.target == kind]) for kind, name in enumerate(flowers.target_names)]
        write(options.pictures / "iris.svg", scatter(groups, "Iris in two dimensions").encode())
        picture = "![Iris in two dimensions](seeds/iris.svg)"
    rows = (
        ("dimensions", "4 to 2", f"{centred.shape[1]} to {form.rank}", "they agree"),
        ("share of the variance", "a picture, no number", f"{energy:.2f} %", "nothing to compare with"),
    )
    before = "150 flowers, four lengths each, centred; the coordinates are the left factor of the rank-2 form."
    return Table(HEADERS, rows, "Iris in two dimensions", before, picture)


def photo(options: Options) -> Table:
    """Truncate the three colour channels of scikit-learn's photo of a temple."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images()
    picture = images.images[[name.endswith("china.jpg") for name in images.filenames].index(True)]
    height, width, _ = picture.shape
    tiles, rows = [(f"original, {height} x {width}", picture)], []
    for rank in (32, 16, 8):
        found = truncated_picture(picture, rank)
        share = rank * (height + width) / (height * width)
        ours = f"{share:.1%} of the values, PSNR {psnr(picture, found):.2f} dB"
        reason = "each colour channel by itself here; the source may stack them"
        rows.append((f"rank {rank}", "a picture, no number", ours, reason))
        tiles.append((f"rank {rank}: {share:.1%} of the values", found))
    after = ""
    if options.pictures is not None:
        stream = io.BytesIO()
        grid(tiles).save(stream, "JPEG", quality=82, optimize=True)
        write(options.pictures / "photo.jpg", stream.getvalue())
        after = "![The photo at rank 32, 16 and 8](seeds/photo.jpg)"
    return Table(HEADERS, tuple(rows), "scikit-learn's sample photo", _PHOTO, after)


def truncated_picture(picture: Array, rank: int) -> Array:
    """Return a picture ``(height, width, 3)`` of uint8 with each channel cut to a rank."""
    channels = [plain_svd(picture[..., each].astype(np.float64), rank).to_dense() for each in range(3)]
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255).astype(np.uint8)


def psnr(picture: Array, found: Array) -> float:
    """Return the peak signal-to-noise ratio of two pictures of uint8 in dB."""
    error = np.mean((picture.astype(np.float64) - found) ** 2)
    return float(10 * np.log10(255.0**2 / error))
