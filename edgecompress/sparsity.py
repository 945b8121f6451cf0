"""Share one number of zeros out over the layers, so that the model's output changes least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgecompress.cluster.prune import prune, saliencies
from edgecompress.orientation import read_weight, stored
from edgecompress.sensitivity import Probe

if TYPE_CHECKING:
    from edgecompress.data import DataSet
    from edgecompress.graph import Graph
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.moments import Moments

Progress = Callable[[int, int], None]

_SAMPLE = 1 << 20
_SMALLEST, _LARGEST = 1e-9, 1e9


def shares_of_zeros(
    graph: Graph,
    layers: Sequence[Layer],
    share: float,
    *,
    moments: Mapping[str, Moments],
    data: DataSet | None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return how much of each layer becomes zero where ``share`` of all their weights does: those of the least score.

    On ``data`` a weight's score is its saliency times ``(d / (e m))^(1/2)``: ``d`` how far the model's output diverges
    when this layer alone is pruned by ``share``, ``e`` the sum of the saliencies that this takes, ``m`` their mean over
    the layer. With ``d / e`` alone, scores would be what a weight adds to the divergence, as far as layers do not
    disturb each other; with ``1 / m`` alone, what it adds to its own layer's relative error. Half way between the two
    was better than either: ResNet-20 at 90 % keeps 80.8 %, 78.2 with the first alone, 76.1 with one share for all.
    Without data a score is the saliency over that of all weights of the layer that are not less salient (the magnitudes
    of LAMP, Lee et al. 2021).

    Every layer keeps at least one weight. Layers of more than 2^20 weights are judged by an even sample. ``progress``
    counts layers.

    Raises:
        ModelError, DataError: the model does not run on ``data``; a weight holds NaN or Inf.
    """
    macs = sum(layer.macs or 0 for layer in layers)
    probe = Probe(graph.model, data, macs=macs, variants=len(layers)) if data is not None else None
    scores: list[Array] = []
    for layer in layers:
        weight, known = read_weight(graph, layer), moments.get(layer.name)
        salient = saliencies(weight, known).reshape(-1)
        salient = salient[:: max(1, layer.parameters // _SAMPLE)]
        if probe is None:
            scores.append(_relative_to_kept(salient) / (layer.parameters / len(salient)))
        else:
            pruned = prune(weight, share, known).astype(weight.dtype)
            effect = probe.divergence({layer.name: stored(pruned, layer)})
            scores.append(salient * _weight_of(salient, effect, share))
        if progress:
            progress(len(scores), len(layers))
    return dict(
        zip(
            (layer.name for layer in layers),
            _lowest(scores, [layer.parameters for layer in layers], share),
            strict=True,
        )
    )


def _weight_of(salient: Array, effect: float, share: float) -> float:
    """Return what a layer's saliencies are multiplied with, 1 where it has none."""
    mean = float(salient.mean())
    taken = float(np.sort(salient)[: max(1, round(share * len(salient)))].mean())
    if mean <= 0.0:
        return 1.0
    felt = min(max(effect, _SMALLEST), _LARGEST) / max(taken, mean * _SMALLEST) / len(salient)
    return math.sqrt(felt / mean)


def _relative_to_kept(salient: Array) -> Array:
    """Return every saliency over the sum of those not less than it, 0 where all are zero."""
    order = np.argsort(salient, kind="stable")
    left = np.cumsum(salient[order][::-1])[::-1]
    found = np.zeros_like(salient)
    found[order] = np.divide(salient[order], left, out=np.zeros_like(left), where=left > 0)
    return found


def _lowest(scores: Sequence[Array], sizes: Sequence[int], share: float) -> list[float]:
    """Return, by layer, which share of its weights is among the lowest ``share`` of all; of equals, the first."""
    owner = np.repeat(np.arange(len(scores)), [len(each) for each in scores])
    worth = np.array([size / len(each) for size, each in zip(sizes, scores, strict=True)])
    order = owner[np.argsort(np.concatenate(scores), kind="stable")]
    within = np.cumsum(worth[order]) <= share * sum(sizes) + 0.5
    counts = np.bincount(order[within], minlength=len(scores)) * worth
    return [min(round(float(count)), size - 1) / size for count, size in zip(counts, sizes, strict=True)]
