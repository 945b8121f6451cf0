"""One compression: what was asked for, and the model and the data that it is about."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgecompress.data import check_shapes, for_validation, split
from edgecompress.graph import integer_limits, open_graph
from edgecompress.model import load_model, payload_bytes, signature
from edgecompress.recipe import Recipe
from edgecompress.validate import random_rows, rows_of, sample_feeds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from edgecompress.data import DataSet
    from edgecompress.model import Array, Model, TensorSpec
    from edgecompress.validate import TestRows

    Step = Callable[[str], AbstractContextManager[Callable[[int, int], None] | None]]

LARGE_MODEL_BYTES = 1 << 30
"""Above this many weight bytes both models run unoptimized, one after the other, and latency is not measured:
folding the clusters of all layers at once would take 2.4 times the memory of the weights."""

_LARGE_MODEL_ROWS = 4


def _silent(_: str) -> AbstractContextManager[Callable[[int, int], None] | None]:
    return nullcontext()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What ``compress`` was asked for.

    ``step`` is called with the name of every long stage and gives its ``(done, total)`` callback, or None.
    """

    recipe: Recipe = field(default_factory=Recipe)
    plan: Path | None = None
    data: Path | None = None
    test_data: Path | None = None
    calibrate: bool = True
    asymmetric: bool = True
    correct: bool = True
    feedback: bool = True
    self_extracting: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    force: bool = False
    command: str = "edgecompress.compress(...)"
    threads: int = 1
    step: Step = _silent


@dataclass(frozen=True, kw_only=True)
class Case:
    """The model and its data. ``feeds`` check every pass; None where the model is too large to run that often."""

    model: Model
    inputs: tuple[TensorSpec, ...]
    calibration: DataSet | None
    test_set: DataSet | None
    test: TestRows
    feeds: Mapping[str, Array] | None

    @property
    def is_large(self) -> bool:
        """Whether the model has more than ``LARGE_MODEL_BYTES`` of weights."""
        return payload_bytes(self.model) > LARGE_MODEL_BYTES


def open_case(source: Path, request: Request) -> Case:
    """Read the model and the data, and check all that can be checked before anything long starts.

    Raises ``ModelError`` or ``DataError``.
    """
    model = load_model(source)
    inputs, _ = signature(model.proto)
    check_shapes(request.shapes, inputs)
    calibration = test_set = None
    if request.data is not None:
        calibration, test_set = split(request.data, request.test_data, inputs)
    elif request.test_data is not None:
        test_set = for_validation(request.test_data, inputs)
    large = payload_bytes(model) > LARGE_MODEL_BYTES
    if test_set is not None:
        test = rows_of(test_set, inputs)
    else:
        limits = integer_limits(open_graph(model))
        test = random_rows(inputs, limits, request.shapes, **({"rows": _LARGE_MODEL_ROWS} if large else {}))
    return Case(
        model=model,
        inputs=inputs,
        calibration=calibration if request.calibrate else None,
        test_set=test_set,
        test=test,
        feeds=None if large else sample_feeds(test, inputs, request.shapes),
    )
