"""Models of the benchmark data with the rows that calibrate and that test them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgecompress.calibrate import calibrate
from edgecompress.data.load import load_data
from edgecompress.graph import open_graph
from edgecompress.inference import run_once
from edgecompress.model import Array, Model, load_model, signature
from edgecompress.passes.prepare import prepare
from edgecompress.passes.run import run_pass
from sources.models import layers_of, weights_of

if TYPE_CHECKING:
    from edgecompress.data.sets import DataSet
    from edgecompress.moments import Moments

MISSING = "Left out: the benchmark data is not here. Give its folder by `--data` or `EDGECOMPRESS_BENCH_DATA`."


@dataclass(frozen=True)
class Case:
    """A model, its normalizations folded, and its data; the calibration rows are training rows without labels."""

    model: Model
    calibration: DataSet
    test: DataSet

    @cached_property
    def weights(self) -> Mapping[str, Array]:
        """Canonical weights by layer."""
        return weights_of(self.model)

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """What flows into each layer on the calibration rows."""
        return calibrate(self.model, layers_of(open_graph(self.model)), self.calibration)

    def measure(self, model: Model) -> str:
        """Return the accuracy in %, or for a model that reconstructs its input the root mean square error."""
        feeds = self.test.feeds(0, self.test.rows)
        (found,) = run_once(model, feeds).values()
        if self.test.labels is None:
            (wanted,) = feeds.values()
            return f"{np.sqrt(np.mean((found.astype(np.float64) - wanted) ** 2)):.4f}"
        return f"{100 * np.mean(found.argmax(axis=1) == self.test.labels):.2f}"


def open_case(data: Path, name: str, dataset: str) -> Case:
    """Read a model of the benchmark data with a data set of ``benchmarks/datasets``."""
    os.environ["EDGECOMPRESS_BENCH_DATA"] = str(data.resolve())  # the data sets name their root by it
    model = run_pass(load_model(data / "models" / f"{name}.onnx"), "prepare", prepare, None)[0]
    description = Path(__file__).parents[1] / "datasets" / f"{dataset}.toml"
    loaded = load_data(description, signature(model.proto)[0])
    assert loaded.calibration is not None
    assert loaded.test is not None
    return Case(model, loaded.calibration, loaded.test)
