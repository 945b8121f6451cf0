"""Cluster weights and store them as a codebook and indices, in operators that the runtime folds when the session starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from edgecompress.cluster.forms import Clustered
from edgecompress.cluster.kmeans import kmeans
from edgecompress.graph import Graph, constants, fresh_name, values_of
from edgecompress.layers import Layer, canonical, check_finite, stored
from edgecompress.model import Array
from edgecompress.moments import Moments
from edgecompress.passes.run import Change
from edgecompress.plan import Plan, pays_off


def codebooks(graph: Graph, forms: Mapping[str, Clustered]) -> Sequence[Change]:
    """Replace constants by ``Gather(codebook, Cast(indices))``; the tensor keeps its name, so every use stays as it is.

    ``forms`` are keyed by the constant's name and shaped as it is stored.
    """
    changes: list[Change] = []
    decoders: list[gs.Node] = []
    present = constants(graph)
    for name, form in forms.items():
        weight = present[name]
        codebook = gs.Constant(fresh_name(graph, f"{name}.codebook"), form.codebook)
        indices = gs.Constant(fresh_name(graph, f"{name}.indices"), form.indices)
        wide = gs.Variable(fresh_name(graph, f"{name}.positions"), dtype=np.int32)
        weight.to_variable(dtype=form.codebook.dtype, shape=list(form.indices.shape))
        decoders.append(gs.Node("Cast", attrs={"to": onnx.TensorProto.INT32}, inputs=[indices], outputs=[wide]))
        decoders.append(gs.Node("Gather", attrs={"axis": 0}, inputs=[codebook, wide], outputs=[weight]))
        action = f"kmeans {form.codebook.size}"
        changes.append(Change(name, action, dense=form.to_dense, tensors=(codebook.name, indices.name)))
    graph.surgeon.nodes = decoders + list(graph.surgeon.nodes)
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

    ``parts`` names the constants that hold a layer now: itself, or its factors. A factor too small for a codebook stays as it is.
    Raises ``ModelError`` for NaN or Inf weights.
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
    factors of ``left @ right`` an error in row ``j`` of ``right`` is amplified by the norm of column ``j`` of ``left``, and the input
    of ``left`` is ``right @ x``.
    """
    if moments is None:
        return [None] * len(parts)
    if len(parts) == 1:
        grouped = np.repeat(moments.diagonal, layer.shape[0] // layer.groups, axis=0)
        return [stored(grouped.reshape(layer.shape), layer)]
    right, left = (part if layer.op == "Conv" else canonical(part, layer) for part in parts)
    rows = right.reshape(right.shape[0], -1).astype(np.float64)
    columns = left.reshape(left.shape[0], -1).astype(np.float64)
    amplified = np.outer((columns**2).sum(axis=0), moments.diagonal[0]).reshape(right.shape)
    if moments.is_full:
        arriving = np.einsum("ij,jk,ik->i", rows, moments.second_moment[0], rows, optimize=True)
    else:
        arriving = (rows**2) @ moments.diagonal[0]
    inner = np.broadcast_to(arriving, columns.shape).reshape(left.shape)
    return [amplified, inner] if layer.op == "Conv" else [stored(amplified, layer), stored(inner, layer)]
