"""Read a layer's weight in its one orientation, ``(C_out, C_in / groups, *kernel)``, and turn it back for storing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.errors import ModelError
from edgecompress.factorize.sizes import FormName, fits
from edgecompress.graph import Graph, is_weight_constant, values_of

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from edgecompress.layers import Layer
    from edgecompress.model import Array

_FIRST_OPSET_WITH_RANGE = 11

BIASED_OPS = ("Conv", "ConvTranspose", "Gemm")
"""The operators with an input for a bias, one value for each output."""

NO_BIAS = "svd_bias needs a constant bias of this layer alone, one value per output, not scaled"
"""Why ``svd_bias`` leaves a layer alone."""


def read_weight(graph: Graph, layer: Layer) -> Array:
    """Return a layer's weight in canonical orientation. Raises ``ModelError`` where it holds NaN or Inf."""
    values = values_of(graph, layer.constant)
    check_finite(layer.name, values)
    return canonical(values, layer)


def bias_of(layer: Layer) -> gs.Constant | None:
    """Return the constant that a layer adds to its outputs, one value for each, ``None`` where there is none.

    Nothing else uses it, one node has the weight, and alpha and beta are 1: so the weight may absorb it.
    """
    if layer.op not in BIASED_OPS or len(layer.nodes) != 1:
        return None
    (node,), outputs = layer.nodes, layer.shape[0]
    bias: Any = node.inputs[2] if len(node.inputs) > 2 else None
    if not is_weight_constant(bias) or len(bias.outputs) != 1 or tuple(bias.shape) not in ((outputs,), (1, outputs)):
        return None
    is_scaled = any(node.attrs.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return None if is_scaled else bias


def read_bias(graph: Graph, layer: Layer) -> Array | None:
    """Return the values of ``bias_of``, shape ``(O,)``. Raises ``ModelError`` where they hold NaN or Inf."""
    bias = bias_of(layer)
    if bias is None:
        return None
    values = values_of(graph, bias).reshape(-1)
    check_finite(bias.name, values)
    return values


def group_shape(layer: Layer) -> tuple[int, ...]:
    """Return the canonical shape of one group's weight, ``(C_out / groups, C_in / groups, *kernel)``."""
    return (layer.shape[0] // layer.groups, *layer.shape[1:])


def why_not(form: FormName, layer: Layer, opset: int) -> str | None:
    """Say why a layer cannot take a form whatever its ranks, ``None`` where it can."""
    if layer.fixed_form is not None:
        return layer.fixed_form
    if not fits(form, group_shape(layer)):
        return f"{form} needs a kernel wider than 1, which this weight does not have"
    if layer.groups > 1 and form in ("svd_bias", "spectral"):
        return f"{form} is not offered for grouped convolutions"
    if form == "spectral" and opset < _FIRST_OPSET_WITH_RANGE:
        return f"spectral needs opset {_FIRST_OPSET_WITH_RANGE} (Range); the model has {opset}"
    if form == "svd_bias" and bias_of(layer) is None:
        return NO_BIAS
    return None


def check_finite(name: str, values: Array) -> None:
    """Raise ``ModelError`` where ``values`` hold NaN or Inf; memory stays bounded for mapped weights."""
    flat = values.reshape(-1)
    step = 1 << 22
    bad = sum(int(np.count_nonzero(~np.isfinite(flat[start : start + step]))) for start in range(0, flat.size, step))
    if bad:
        raise ModelError(
            f"weight {name!r} holds {bad} NaN or Inf values",
            hint="the model is damaged; export it again from its source",
        )


def canonical(values: Array, layer: Layer) -> Array:
    """Turn stored weight values into ``(C_out, C_in / groups, *kernel)``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":  # stored as (C_in, C_out / groups, *kernel)
        grouped = values.reshape(layer.groups, values.shape[0] // layer.groups, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.shape)
    if layer.orientation == "directions":  # stored as (directions, gates * hidden, inputs)
        return values.reshape(layer.shape)
    return values


def stored(values: Array, layer: Layer) -> Array:
    """Undo ``canonical``."""
    if layer.orientation == "transposed":
        return np.swapaxes(values, -1, -2)
    if layer.orientation == "deconvolution":
        out = values.shape[0] // layer.groups
        grouped = values.reshape(layer.groups, out, *values.shape[1:])
        return np.swapaxes(grouped, 1, 2).reshape(layer.groups * values.shape[1], out, *values.shape[2:])
    if layer.orientation == "directions":
        return values.reshape(layer.groups, -1, values.shape[-1])
    return values
