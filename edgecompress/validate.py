"""Run the original and the compressed model on the same rows and compare them: distortion, agreement, a metric, tolerances."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgecompress.data import DataSet, batches, fixed_batch, random_feeds
from edgecompress.errors import ToleranceError, UsageError
from edgecompress.files import output_errors
from edgecompress.metrics import AUTO, Comparison, Metric, add, finish, start
from edgecompress.model import Array, TensorSpec
from edgecompress.runtime.worker import Worker

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 128
_RANDOM_ROWS = 32

Batch = tuple[dict[str, Array], Array | None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TestRows:
    """What both models run on. ``read`` gives (feeds, labels) batch by batch and may be called again; ``name`` is for the report."""

    name: str
    rows: int
    metric: Metric
    read: Callable[[], Iterator[Batch]]
    is_random: bool = False


@dataclass(frozen=True)
class Validation:
    """The comparison and on what it was made; ``row_ms`` is what one row took the original, roughly."""

    comparison: Comparison
    data: str
    row_ms: float


def rows_of(data: DataSet, inputs: Sequence[TensorSpec]) -> TestRows:
    """Return the rows of a data set, in batches of bounded size."""
    first = data.feeds(0, 1)
    row_bytes = sum(values.nbytes for values in first.values())
    size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))

    def read() -> Iterator[Batch]:
        for rows, feeds in batches(data, inputs, size):
            yield feeds, None if data.labels is None else data.labels[rows]

    return TestRows(f"{data.name}, {data.rows} rows", data.rows, data.metric, read)


def random_rows(
    inputs: Sequence[TensorSpec], limits: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], *, rows: int = _RANDOM_ROWS
) -> TestRows:
    """Return random inputs: they can show agreement and distortion, not accuracy. ``limits`` bound integer inputs."""
    free = bool(inputs) and not shapes and all(spec.shape and spec.shape[0] is None for spec in inputs)
    seeds = [0] if free else list(range(rows))
    drawn = [
        random_feeds(inputs, rows=rows if free else 1, integer_limits=limits, shapes=shapes, seed=seed) for seed in seeds
    ]

    def read() -> Iterator[Batch]:
        for feeds in drawn:
            yield feeds, None

    return TestRows(f"random inputs, {rows} rows", rows, AUTO, read, is_random=True)


def sample_feeds(test: TestRows, inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return the feeds of one run, for timing: one row where the batch is free, else what the model is fixed to."""
    feeds, _ = next(test.read())
    if shapes or fixed_batch(inputs) is not None:
        return feeds
    return {name: values[:1] for name, values in feeds.items()}


def validate(
    original: Path, compressed: Path, test: TestRows, *, low_memory: bool = False, progress: Progress | None = None
) -> Validation:
    """Compare two models, each ``.onnx``, ``.ecz`` or a bundle, in a process of its own, one after the other.

    The original's outputs wait in a temporary folder, so that the two are never in memory together.

    Raises:
        ModelError: one of them does not load or run.
        DataError: the rows do not fit.
        OutputError: the temporary folder is full.
    """
    state = start(test.metric)
    total, done = 2 * test.rows, 0
    with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder, output_errors(Path(folder)):
        began = time.perf_counter()
        for number, (feeds, outputs, _) in enumerate(_run(original, test, low_memory=low_memory)):
            np.savez(Path(folder) / f"{number}.npz", **{f"o{place}": values for place, values in enumerate(outputs.values())})
            names = tuple(outputs)
            done += _row_count(feeds)
            if progress:
                progress(min(done, total), total)
        row_ms = (time.perf_counter() - began) * 1e3 / max(1, test.rows)
        for number, (feeds, outputs, labels) in enumerate(_run(compressed, test, low_memory=low_memory)):
            reference = _load(Path(folder) / f"{number}.npz", names)
            if set(reference) != set(outputs):
                raise UsageError(
                    f"the two models have different outputs: {sorted(reference)} and {sorted(outputs)}",
                    hint="compare a model with what it was compressed to",
                )
            state = add(state, reference, {name: outputs[name] for name in reference}, labels=labels, inputs=feeds)
            done += _row_count(feeds)
            if progress:
                progress(min(done, total), total)
    return Validation(finish(state), test.name, row_ms)


def _run(
    path: Path, test: TestRows, *, low_memory: bool
) -> Iterator[tuple[dict[str, Array], dict[str, Array], Array | None]]:
    with Worker(path, low_memory=low_memory, threads=0) as worker:
        for feeds, labels in test.read():
            yield feeds, worker.run(feeds), labels


def _load(path: Path, names: Sequence[str]) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        outputs = {name: archive[f"o{place}"] for place, name in enumerate(names)}
    path.unlink()
    return outputs


def _row_count(feeds: Mapping[str, Array]) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def require(validation: Validation, *, min_sqnr_db: float | None, max_drop: float | None) -> None:
    """Raise ``ToleranceError`` where an output's SQNR is below ``min_sqnr_db`` or the drop is above ``max_drop`` points."""
    misses = []
    for name, distortion in validation.comparison.outputs.items():
        identical = distortion.error_energy == 0.0 and distortion.max_abs == 0.0
        if min_sqnr_db is not None and not identical and (distortion.sqnr_db is None or distortion.sqnr_db < min_sqnr_db):
            found = "unknown" if distortion.sqnr_db is None else f"{distortion.sqnr_db:.2f} dB"
            misses.append(f"output {name!r}: SQNR {found} is below {min_sqnr_db:g} dB")
    drop = validation.comparison.drop_points
    if max_drop is not None and (drop is None or drop > max_drop):
        misses.append(f"drop {'unknown' if drop is None else f'{drop:.2f}'} is above {max_drop:g} points")
    if misses:
        raise ToleranceError("; ".join(misses), hint="use more bits or a larger share (--bits, --keep), or allow more")
