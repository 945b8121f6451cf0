"""Solve layers in graph order, each on what the layers before it, compressed already, really give it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgecompress.calibrate import MAX_FULL_DIMENSION, batch_rows, check_activation
from edgecompress.moments import PairedMoments, accumulate_pair
from edgecompress.patches import activation_name, patches, positions_wanted
from edgecompress.prefix import Prefix, feeds_of

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.layers import Layer
    from edgecompress.model import Array, Model


@dataclass(frozen=True)
class OutputMoments:
    """Means and variances of a layer's outputs, ``(2, C_out)`` each: of the original, of the compressed model."""

    means: Array
    variances: Array


class Walk:
    """The original and the compressed model side by side, from the first of some layers to the last.

    The layers are asked for in graph order, each once, and settled before the next one is asked for.
    """

    def __init__(self, model: Model, data: DataSet, layers: Sequence[Layer]) -> None:
        """Start at the inputs; ``layers`` are those that will be asked for."""
        sources = [activation_name(layer, node) for layer in layers for node in layer.nodes]
        self._rows = data.rows
        self._remaining = list(layers)
        pending = [layer.name for layer in layers]
        feeds = feeds_of(model, data, batch_rows(model, sources, data))
        self._original, self._compressed = (Prefix(model, feeds, pending=pending) for _ in range(2))

    def pair(self, layer: Layer) -> PairedMoments:
        """Return the moments of what flows into a layer in both models. Raises ``DataError`` for NaN or Inf."""
        full = math.prod(layer.shape[1:]) <= MAX_FULL_DIMENSION
        found: PairedMoments | None = None
        for original, compressed in self._blocks(layer):
            found = accumulate_pair(found, layer.name, original, compressed, full=full)
        assert found is not None
        return found

    def outputs(self, layer: Layer, original: Array, compressed: Array) -> OutputMoments:
        """Return what a layer gives in both models, for its two canonical weights; biases are not counted."""
        weights = [_by_group(weight, layer.groups) for weight in (original, compressed)]
        sums, squares, count = np.zeros((2, layer.shape[0])), np.zeros((2, layer.shape[0])), 0
        for blocks in self._blocks(layer):
            for place, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
                rows = np.matmul(block.swapaxes(0, 1), weight).swapaxes(0, 1).reshape(len(block), -1)
                sums[place] += rows.sum(axis=0, dtype=np.float64)
                squares[place] += np.einsum("po,po->o", rows, rows, dtype=np.float64)
            count += len(blocks[0])
        means = sums / count
        return OutputMoments(means=means, variances=np.maximum(squares / count - means**2, 0.0))

    def settle(self, layer: Layer, values: Mapping[str, Array]) -> None:
        """Say what the compressed model has in place of a layer's constants, given as they are stored."""
        self._original.replace({}, settled=layer.name)
        self._compressed.replace(values, settled=layer.name)
        self._remaining = [other for other in self._remaining if other.name != layer.name]
        targets = [activation_name(other, node) for other in self._remaining for node in other.nodes]
        for prefix in (self._original, self._compressed):
            prefix.forget(targets)

    def _blocks(self, layer: Layer) -> Iterator[tuple[Array, Array]]:
        """Yield what flows into a layer in both models, at the same positions, ``(positions, groups, d)`` each."""
        targets = [activation_name(layer, node) for node in layer.nodes]
        runs = zip(self._original.run(targets), self._compressed.run(targets), strict=True)
        for (rows, before), (_, after) in runs:
            quota = positions_wanted(layer, (rows.stop - rows.start) / self._rows)
            for node, name in zip(layer.nodes, targets, strict=True):
                check_activation(layer, before[name])
                check_activation(layer, after[name])
                yield from zip(
                    patches(layer, node, before[name], quota), patches(layer, node, after[name], quota), strict=True
                )


def _by_group(weight: Array, groups: int) -> Array:
    """Return a canonical weight as ``(groups, d, C_out / groups)``, float32 or wider."""
    kind = np.promote_types(weight.dtype, np.float32)
    return weight.reshape(groups, weight.shape[0] // groups, -1).swapaxes(1, 2).astype(kind)
