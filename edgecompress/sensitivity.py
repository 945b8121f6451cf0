"""Measure how much a model's output changes when some of its weights do, on a few calibration rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from edgecompress.data import DataSet, batches
from edgecompress.inference import open_session, run_session
from edgecompress.model import Array, Model, signature

MAX_ROWS = 256
"""Rows that are looked at, where the work allows. More move the allocation by less than it varies with the images."""

WORK_LIMIT_MACS = 8 * 10**12
"""Multiply-accumulates that all measurements may take together: a minute or so on two cores."""

TEMPERATURE = 2.0
"""Logits are divided by this. At 1 a few images near a decision make up most of a mean: the same judgement of a layer
then needs four times the rows."""

_MIN_ROWS = 8
_BATCH_ROWS = 64
_OUTPUT_BUDGET_BYTES = 256 << 20

if TYPE_CHECKING:
    Feeds = Mapping[str, Array]


def divergence(reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> float:
    """Return how far ``outputs`` of a model are from those that it should give: 0 where equal, else positive.

    For classes, ``(N, classes)`` with any further axes of length 1, this is the mean Kullback-Leibler divergence of the
    softmax at temperature T = ``TEMPERATURE``, times T squared (Hinton et al. 2015); where both sides are probabilities
    already, their logarithms are the logits. For all else it is the squared error over the squared reference. Both grow
    with the square of a small error. Several outputs are averaged; those that are no floats do not count.
    """
    found = [_divergence(values, outputs[name]) for name, values in reference.items() if values.dtype.kind == "f"]
    return float(np.mean(found)) if found else 0.0


def _divergence(reference: Array, output: Array) -> float:
    wanted, got = reference.astype(np.float64), output.astype(np.float64)
    if not np.isfinite(got).all():
        return np.inf
    if not _are_classes(wanted):
        energy = float(np.sum(wanted**2))
        return float(np.sum((got - wanted) ** 2)) / energy if energy else float(np.sum(got**2))
    wanted, got = wanted.reshape(len(wanted), -1), got.reshape(len(got), -1)
    if _are_probabilities(wanted) and _are_probabilities(got):
        smallest = np.finfo(reference.dtype).tiny
        wanted, got = np.log(np.maximum(wanted, smallest)), np.log(np.maximum(got, smallest))
    wanted, got = _log_softmax(wanted / TEMPERATURE), _log_softmax(got / TEMPERATURE)
    return max(0.0, TEMPERATURE**2 * float(np.mean(np.sum(np.exp(wanted) * (wanted - got), axis=1))))


def _are_classes(values: Array) -> bool:
    return values.ndim >= 2 and len(values) > 0 and values.shape[1] > 1 and values[0].size == values.shape[1]


def _are_probabilities(rows: Array) -> bool:
    return bool((rows >= 0).all() and np.allclose(rows.sum(axis=1), 1.0, atol=1e-2))  # float16 sums to no better


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)))


class Probe:
    """A model and what it gives on a few rows, against which it is run again with other weights."""

    def __init__(self, model: Model, data: DataSet, *, macs: int, variants: int) -> None:
        """Run the model as it is, on the first rows of ``data``.

        ``macs`` (of one row) and ``variants`` (measurements to come) bound the rows: at most ``MAX_ROWS``, fewer where
        all would take more than ``WORK_LIMIT_MACS`` or the feeds and outputs more than 256 MB. Raises ``ModelError``
        or ``DataError`` as running the model does.
        """
        self._model = model
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(model.proto)
        self._initializers = {tensor.name: tensor for tensor in self._proto.graph.initializer}
        inputs, _ = signature(model.proto)
        session = open_session(model)
        rows = int(min(MAX_ROWS, max(_MIN_ROWS, WORK_LIMIT_MACS // max(1, macs * variants))))
        self._batches: list[tuple[Feeds, dict[str, Array]]] = []
        held = 0
        for taken, feeds in batches(data, inputs, min(rows, _BATCH_ROWS)):
            if self._batches and taken.stop > rows:
                break
            outputs = _run(model, session, feeds)
            held += sum(values.nbytes for values in (*feeds.values(), *outputs.values()))
            if self._batches and held > _OUTPUT_BUDGET_BYTES:
                break
            self._batches.append((feeds, outputs))

    def divergence(self, weights: Mapping[str, Array]) -> float:
        """Return the ``divergence`` of the outputs when the initializers named have these values, shaped as stored.

        Mean over the batches. Raises ``ModelError`` with the runtime's reason.
        """
        originals = {name: self._initializers[name].SerializeToString() for name in weights}
        try:
            for name, values in weights.items():
                self._initializers[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
            session = open_session(Model(self._model.path, self._proto))
        finally:
            for name, original in originals.items():
                self._initializers[name].ParseFromString(original)
        return self._divergence(session)

    def divergence_of(self, model: Model) -> float:
        """Return the ``divergence`` of the outputs of ``model``, which has the same inputs and outputs, as above."""
        return self._divergence(open_session(model))

    def _divergence(self, session: Any) -> float:
        found = [divergence(wanted, _run(self._model, session, feeds)) for feeds, wanted in self._batches]
        return float(np.mean(found))


def _run(model: Model, session: Any, feeds: Feeds) -> dict[str, Array]:
    """Run a session; the outputs are copies: the runtime's own arrays keep all that the session allocated alive."""
    found = run_session(model, session, feeds)
    return {name: np.array(values) for name, values in found.items() if isinstance(values, np.ndarray)}
