"""Data sets: arrays, pictures, dataset.toml; which rows calibrate and which test; random inputs without data."""

from __future__ import annotations

from edgecompress.data.load import for_validation, load_data, split
from edgecompress.data.preprocess import Preprocess
from edgecompress.data.sets import Data, DataSet, batches, fixed_batch, rows_used
from edgecompress.data.synthetic import check_shapes, parse_shape, random_feeds

__all__ = [
    "Data",
    "DataSet",
    "Preprocess",
    "batches",
    "check_shapes",
    "fixed_batch",
    "for_validation",
    "load_data",
    "parse_shape",
    "random_feeds",
    "rows_used",
    "split",
]
