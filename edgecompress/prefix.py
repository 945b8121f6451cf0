"""Run a model piece by piece, up to one tensor after the other, while the weights of what comes before change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from edgecompress.data import DataSet, batches
from edgecompress.inference import open_session, run_session
from edgecompress.model import Array, Model, signature
from edgecompress.tensors import copy_fields, nested_graphs

CACHE_BUDGET_BYTES = 1 << 30
"""How many bytes of inner tensors one model keeps. What does not fit is computed again from what came before it."""


@dataclass(frozen=True)
class Feeds:
    """The inputs of a model, batch by batch: ``read`` gives (which rows, feeds) and may be called again."""

    rows: int
    read: Callable[[], Iterable[tuple[slice, dict[str, Array]]]]


def feeds_of(model: Model, data: DataSet, batch_rows: int) -> Feeds:
    """Return a data set in batches for a model: read once and held where it fits ``CACHE_BUDGET_BYTES``."""
    inputs, _ = signature(model.proto)
    rows, feeds = next(batches(data, inputs, batch_rows))
    if sum(values.nbytes for values in feeds.values()) * data.rows <= CACHE_BUDGET_BYTES * (rows.stop - rows.start):
        held = list(batches(data, inputs, batch_rows))
        return Feeds(data.rows, lambda: held)
    return Feeds(data.rows, lambda: batches(data, inputs, batch_rows))


class Prefix:
    """A model that runs up to given tensors, on all rows, with some initializers replaced.

    Tensors that were reached are kept, so that going through a model from front to back costs one run in all. A tensor
    that depends on an initializer in ``pending``, one that is still to be replaced, is not: it will change.
    """

    def __init__(self, model: Model, feeds: Feeds, *, pending: Iterable[str]) -> None:
        """Start at the inputs, which ``feeds`` gives."""
        self._model = model
        self._feeds = feeds
        self._inputs = {spec.name for spec in signature(model.proto)[0]}
        self._producers = {name: node for node in model.proto.graph.node for name in node.output if name}
        self._replaced: dict[str, onnx.TensorProto] = {}
        self._pending = set(pending)
        self._kept: list[dict[str, Array]] = []

    def replace(self, values: Mapping[str, Array], *, settled: str) -> None:
        """Give initializers other values; the one named ``settled`` is not pending any more."""
        for name, array in values.items():
            self._replaced[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        self._pending.discard(settled)

    def run(self, targets: Sequence[str]) -> Iterator[tuple[slice, dict[str, Array]]]:
        """Yield (which rows, the tensors named in ``targets``) batch by batch.

        Raises ``ModelError`` or ``DataError`` as running the model does.
        """
        wanted = sorted(set(targets) - self._known - self._inputs)
        nodes, sources = self._piece(wanted, self._known)
        session, kept = None, [name for name in wanted if self._is_settled(name)]
        for number, (rows, feeds) in enumerate(self._feeds.read()):
            if number == len(self._kept):
                self._kept.append({})
            present = {**feeds, **self._kept[number]}
            if wanted:
                enter = {name: present[name] for name in sources}
                session = session or open_session(self._build(nodes, enter, wanted))
                found = run_session(self._model, session, enter)
                if number == 0:
                    kept = self._fitting({name: found[name] for name in kept}, rows)
                # copies: an array of the runtime keeps the memory of its whole session alive
                self._kept[number].update({name: found[name].copy() for name in kept})
                present |= found
            yield rows, {name: present[name] for name in targets}

    def forget(self, targets: Sequence[str]) -> None:
        """Drop what is not needed to reach any of ``targets``."""
        nodes, sources = self._piece(targets, self._known)
        for name in self._known.difference(sources):
            for batch in self._kept:
                del batch[name]
        used = {name for node in nodes for name in _inputs_of(node)}
        self._replaced = {name: tensor for name, tensor in self._replaced.items() if name in used}

    @property
    def _known(self) -> set[str]:
        return set(self._kept[0]) if self._kept else set()

    def _fitting(self, found: Mapping[str, Array], rows: slice) -> list[str]:
        """Return the names of the tensors that can be kept for all rows, judged by a first batch."""
        budget = CACHE_BUDGET_BYTES * (rows.stop - rows.start) / max(1, self._feeds.rows)
        held = sum(values.nbytes for values in self._kept[0].values())
        names = []
        for name, values in found.items():
            if held + values.nbytes <= budget:
                held += values.nbytes
                names.append(name)
        return names

    def _is_settled(self, target: str) -> bool:
        """Tell whether nothing that a tensor depends on is still to change."""
        nodes, _ = self._piece([target], set())
        return not any(name in self._pending for node in nodes for name in _inputs_of(node))

    def _piece(self, targets: Sequence[str], known: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """Return the nodes, in graph order, that compute ``targets``, and the known tensors and inputs they need."""
        needed: set[int] = set()
        sources: set[str] = set()
        waiting = list(targets)
        while waiting:
            name = waiting.pop()
            if name in known or name in self._inputs:
                sources.add(name)
                continue
            node = self._producers.get(name)
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                waiting.extend(_inputs_of(node))
        return [node for node in self._model.proto.graph.node if id(node) in needed], sorted(sources)

    def _build(self, nodes: Sequence[onnx.NodeProto], sources: Mapping[str, Array], targets: Sequence[str]) -> Model:
        """Return a piece as a model of its own."""
        graph = self._model.proto.graph
        used = {name for node in nodes for name in _inputs_of(node)}
        proto = onnx.ModelProto()
        copy_fields(self._model.proto, proto, leave_out=("graph",))
        proto.ir_version = max(proto.ir_version, 4)  # before, every initializer had to be an input, too
        proto.graph.name = graph.name or "piece"
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(
            self._replaced.get(tensor.name, tensor) for tensor in graph.initializer if tensor.name in used
        )
        proto.graph.sparse_initializer.extend(
            tensor for tensor in graph.sparse_initializer if tensor.values.name in used
        )
        for name, values in sources.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
            proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * values.ndim))
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in targets)
        return Model(self._model.path, proto)


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the tensors that a node reads, those of its bodies too."""
    yield from (name for name in node.input if name)
    for graph in nested_graphs(node):
        yield from (value.name for value in graph.output)
        for inner in graph.node:
            yield from _inputs_of(inner)
