"""Cluster weights; store them as a codebook and indices, in operators that the runtime folds when a session starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompress.cluster.kmeans import kmeans
from edgecompress.graph import Graph, constants, fresh_name, values_of
from edgecompress.orientation import canonical, check_finite, stored
from edgecompress.passes.decoders import insert_decoders
from edgecompress.passes.run import Change
from edgecompress.plan import Plan, pays_off

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgecompress.cluster.forms import Clustered
    from edgecompress.layers import Layer
    from edgecompress.model import Array
    from edgecompress.moments import Moments

_IMPORTANCE_FLOOR = 1e-3
"""Share of the mean importance that every value has at least."""


def codebooks(graph: Graph, forms: Mapping[str, Clustered]) -> Sequence[Change]:
    """Replace constants by ``Gather(codebook, Cast(indices))``; the tensor keeps its name, so every use stays as it is.

    ``forms`` are keyed by the constant's name and shaped as it is stored.
    """
    changes: list[Change] = []
    decoders: dict[str, list[gs.Node]] = {}
    present = constants(graph)
    for name, form in forms.items():
        weight = present[name]
        codebook = gs.Constant(fresh_name(graph, f"{name}.codebook"), form.codebook)
        indices = gs.Constant(fresh_name(graph, f"{name}.indices"), form.indices)
        wide = gs.Variable(fresh_name(graph, f"{name}.positions"), dtype=np.int32)
        weight.to_variable(dtype=form.codebook.dtype, shape=list(form.indices.shape))
        decoders[name] = [
            gs.Node("Cast", attrs={"to": onnx.TensorProto.INT32}, inputs=[indices], outputs=[wide]),
            gs.Node("Gather", attrs={"axis": 0}, inputs=[codebook, wide], outputs=[weight]),
        ]
        action = f"kmeans {form.codebook.size}"
        changes.append(Change(name, action, dense=form.to_dense, tensors=(codebook.name, indices.name)))
    insert_decoders(graph, decoders)
    return changes


def solve_codebooks(
    graph: Graph,
    layers: Sequence[Layer],
    plan: Plan,
    parts: Mapping[str, tuple[str, ...]],
    *,
    moments: Mapping[str, Moments],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Clustered]:
    """Cluster the constants of every layer that the plan clusters, keyed by constant.

    ``parts`` names the constants that hold a layer now: itself, or its factors. A factor too small for a codebook stays
    as it is. Raises ``ModelError`` for NaN or Inf weights.
    """
    wanted = {entry.layer: entry.weights for entry in plan.layers if entry.weights is not None}
    present = constants(graph)
    forms: dict[str, Clustered] = {}
    done = 0
    for layer in layers:
        asked = wanted.get(layer.name)
        if asked is None:
            continue
        names = parts[layer.name]
        values = [values_of(graph, present[name]) for name in names]
        known = moments.get(layer.name) if asked.calibrated else None
        importances = _importances(layer, values, known)
        for name, part, importance in zip(names, values, importances, strict=True):
            check_finite(name, part)
            if len(names) == 1 or pays_off(part.size, part.itemsize, asked.bits):
                forms[name] = kmeans(part, 2**asked.bits, importance)
        done += 1
        if progress:
            progress(done, len(wanted))
    return forms


def _importances(layer: Layer, parts: Sequence[Array], moments: Moments | None) -> list[Array | None]:
    """Return, per constant, how much a squared error of each value adds to the squared error of the layer's output.

    For a whole weight this is the mean square of the input it multiplies (the diagonal of the second moment). For the
    factors of ``left @ right`` an error in row ``j`` of ``right`` is amplified by the norm of column ``j`` of ``left``,
    and the input of ``left`` is ``right @ x``. Shapes broadcast to those of the constants as they are stored.
    """
    if moments is None:
        return [None] * len(parts)
    if len(parts) == 1 and parts[0].size != layer.parameters:
        return [None]  # coefficients of the whole weight: each of them touches every input
    if len(parts) == 1:
        rows = (
            np.repeat(moments.diagonal, layer.shape[0] // layer.groups, axis=0)
            if layer.groups > 1
            else moments.diagonal
        )
        return [_floored(stored(rows.reshape(-1, *layer.shape[1:]), layer))]
    if len(parts) != 2 or layer.groups > 1 or any(size > 1 for size in parts[1].shape[2:]):
        return [None] * len(parts)  # only for a plain product is it this simple
    right, left = (part if layer.op == "Conv" else canonical(part, layer) for part in parts)
    rows = right.reshape(right.shape[0], -1).astype(np.float64)
    columns = left.reshape(left.shape[0], -1).astype(np.float64)
    amplified = np.outer((columns**2).sum(axis=0), moments.diagonal[0]).reshape(right.shape)
    if moments.is_full:
        arriving = np.sum((rows @ moments.second_moment[0]) * rows, axis=1)
    else:
        arriving = (rows**2) @ moments.diagonal[0]
    inner = arriving.reshape(1, -1, *(1,) * (left.ndim - 2))
    if layer.op != "Conv":
        amplified, inner = stored(amplified, layer), stored(inner, layer)
    return [_floored(amplified), _floored(inner)]


def _floored(importance: Array) -> Array:
    """Keep values that calibration never saw from being left without a centroid."""
    return np.asarray(importance + _IMPORTANCE_FLOOR * float(np.mean(importance)))
