"""Run the original and the compressed model on the same rows and compare: distortion, agreement, metric, tolerances."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from edgecompress.artifacts import open_artifact
from edgecompress.data import DataSet, batches, random_feeds, rows_used
from edgecompress.errors import ModelError, ToleranceError
from edgecompress.files import output_errors
from edgecompress.graph import integer_limits, open_graph
from edgecompress.metrics import AUTO, Comparison, Metric, add, finish, start
from edgecompress.model import Array, Model, TensorSpec, signature
from edgecompress.runtime.worker import Worker

WAITING_LIMIT_BYTES = 1 << 30
"""How much the temporary folder may hold where the two models run one after the other."""

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 128
_RANDOM_ROWS = 32

Batch = tuple[dict[str, Array], Array | None]
Pairs = Generator[tuple[Batch, dict[str, Array], dict[str, Array], float], None, None]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TestRows:
    """What both models run on.

    ``read`` gives (feeds, labels) batch by batch and may be called again; ``name`` is for the report.
    """

    name: str
    rows: int
    metric: Metric
    read: Callable[[], Iterator[Batch]]


@dataclass(frozen=True)
class Validation:
    """The comparison and on what it was made; ``row_ms`` is what one row took the original, roughly."""

    comparison: Comparison
    data: str
    row_ms: float


def rows_of(data: DataSet, inputs: Sequence[TensorSpec]) -> TestRows:
    """Return the rows of a data set, in batches of bounded size."""
    used, _ = rows_used(data.rows, inputs)
    row_bytes = sum(values.nbytes for values in data.feeds(0, 1).values())
    size = max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES // max(1, row_bytes)))

    def read() -> Iterator[Batch]:
        for rows, feeds in batches(data, inputs, size):
            yield feeds, None if data.labels is None else data.labels[rows]

    return TestRows(f"{data.name}, {used} rows", used, data.metric, read)


def random_rows(
    inputs: Sequence[TensorSpec],
    limits: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    rows: int = _RANDOM_ROWS,
) -> TestRows:
    """Return random inputs: they can show agreement and distortion, not accuracy. ``limits`` bound integer inputs."""
    free = bool(inputs) and not shapes and all(spec.shape and spec.shape[0] is None for spec in inputs)
    each, seeds = (rows, range(1)) if free else (1, range(rows))

    def read() -> Iterator[Batch]:
        for seed in seeds:
            yield random_feeds(inputs, rows=each, integer_limits=limits, shapes=shapes, seed=seed), None

    return TestRows(f"random inputs, {rows} rows", rows, AUTO, read)


def sample_feeds(
    test: TestRows, inputs: Sequence[TensorSpec], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Array]:
    """Return the feeds of one run, for timing: one row where the batch is free, else what the model is fixed to."""
    feeds, _ = next(test.read())
    free = all(spec.shape[0] is None for spec in inputs if spec.shape)
    if shapes or not free:
        return feeds
    return {name: values[:1] if values.ndim else values for name, values in feeds.items()}


def random_sample(model: Model, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    """Return random inputs for one run of a model."""
    inputs, _ = signature(model.proto)
    return random_feeds(inputs, rows=1, integer_limits=integer_limits(open_graph(model)), shapes=shapes)


def validate(
    original: Path, compressed: Path, test: TestRows, *, low_memory: bool = False, progress: Progress | None = None
) -> Validation:
    """Compare two models, each ``.onnx``, ``.ecz`` or a bundle, each in a process of its own.

    With ``low_memory`` they run one after the other and never are in memory together; the original's outputs wait in a
    temporary folder, at most ``WAITING_LIMIT_BYTES`` and one batch at a time.

    Raises:
        ModelError: one of them does not load or run, or they have different inputs or outputs.
        DataError: the rows do not fit.
        OutputError: the temporary folder is full.
    """
    _refuse_different(original, compressed)
    state, done, elapsed_ms = start(test.metric), 0, 0.0
    pairs = (_one_after_the_other if low_memory else _side_by_side)(original, compressed, test)
    with closing(pairs):  # an error must not leave it to the garbage collector to end the processes
        for (feeds, labels), reference, outputs, milliseconds in pairs:
            elapsed_ms += milliseconds
            state = add(state, reference, outputs, labels=labels, inputs=feeds)
            done += _row_count(feeds)
            if progress:
                progress(min(done, test.rows), test.rows)
    return Validation(finish(state), test.name, elapsed_ms / max(1, test.rows))


def _refuse_different(original: Path, compressed: Path) -> None:
    """Raise ``ModelError`` where two models do not have the same inputs and outputs, by name and type."""
    # one model at a time: what was read of the first is gone when the second is read
    first, second = (signature(open_artifact(path).proto) for path in (original, compressed))
    for what, one, other in zip(("inputs", "outputs"), first, second, strict=True):
        specs = [{spec.name: spec.dtype for spec in side} for side in (one, other)]
        if specs[0] != specs[1]:
            left, right = (", ".join(f"{name} {dtype}" for name, dtype in side.items()) or "none" for side in specs)
            raise ModelError(
                f"the two models have different {what}: {left} in {original}, but {right} in {compressed}",
                hint="compare a model with what it was compressed to",
            )


def _side_by_side(original: Path, compressed: Path, test: TestRows) -> Pairs:
    """Yield each batch with the outputs of both models, and the milliseconds that the original took."""
    with Worker(original, threads=0) as first, Worker(compressed, threads=0) as second:
        for feeds, labels in test.read():
            began = time.perf_counter()
            reference = first.run(feeds)
            elapsed_ms = (time.perf_counter() - began) * 1e3
            yield (feeds, labels), reference, second.run(feeds), elapsed_ms


def _one_after_the_other(original: Path, compressed: Path, test: TestRows) -> Pairs:
    """Yield what ``_side_by_side`` does, with only one of the two in memory at any time."""
    source = test.read()
    while (first := next(source, None)) is not None:
        with tempfile.TemporaryDirectory(prefix="edgecompress-") as folder, output_errors(Path(folder)):
            waiting: list[tuple[Array | None, float]] = []
            with Worker(original, threads=0, low_memory=True) as worker:
                used = 0
                for feeds, labels in chain([first], source):
                    began = time.perf_counter()
                    outputs = worker.run(feeds)
                    elapsed_ms = (time.perf_counter() - began) * 1e3
                    used += _keep(Path(folder) / f"{len(waiting)}", feeds, outputs)
                    waiting.append((labels, elapsed_ms))
                    if used >= WAITING_LIMIT_BYTES:
                        break
            with Worker(compressed, threads=0, low_memory=True) as worker:
                for number, (labels, elapsed_ms) in enumerate(waiting):
                    feeds, reference = _take(Path(folder) / f"{number}")
                    yield (feeds, labels), reference, worker.run(feeds), elapsed_ms


def _keep(place: Path, *groups: Mapping[str, Array]) -> int:
    """Write arrays to a folder, in files whose names say nothing, and return their bytes."""
    place.mkdir()
    for number, group in enumerate(groups):
        for position, (name, values) in enumerate(group.items()):
            text = values.dtype.kind == "O"  # the runtime's strings, which numpy would have to pickle
            np.savez(place / f"{number}.{position:06}.npz", np.array(name), values.astype(str) if text else values)
    return sum(file.stat().st_size for file in place.iterdir())


def _take(place: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return what ``_keep`` wrote and remove it."""
    groups: tuple[dict[str, Array], dict[str, Array]] = {}, {}
    for file in sorted(place.iterdir()):
        with np.load(file, allow_pickle=False) as archive:
            groups[int(file.name.partition(".")[0])][str(archive["arr_0"])] = archive["arr_1"]
        file.unlink()
    return groups


def _row_count(feeds: Mapping[str, Array]) -> int:
    first = next(iter(feeds.values()), None)
    return int(first.shape[0]) if first is not None and first.ndim else 1


def require(validation: Validation, *, min_sqnr_db: float | None, max_drop: float | None) -> None:
    """Raise ``ToleranceError`` where an output's SQNR is below ``min_sqnr_db`` or the drop above ``max_drop``."""
    misses = []
    for name, distortion in validation.comparison.outputs.items():
        identical = distortion.error_energy == 0.0 and distortion.max_abs == 0.0
        found = distortion.sqnr_db
        if min_sqnr_db is not None and not identical and (found is None or found < min_sqnr_db):
            said = "unknown, not at least" if found is None else f"{found:.2f} dB is below"
            misses.append(f"output {name!r}: SQNR {said} {min_sqnr_db:g} dB")
    drop = validation.comparison.drop_points
    if max_drop is not None and (drop is None or drop > max_drop):
        said = "unknown, not at most" if drop is None else f"{drop:.2f} is above"
        misses.append(f"drop {said} {max_drop:g} points")
    if misses:
        raise ToleranceError("; ".join(misses), hint="use more bits or a larger share (--bits, --keep), or allow more")
