"""A factorized convolution as the plain convolutions it runs as, and back to one dense kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.factorize.forms import CP, InputLowRank, LowRank, Separable, Tucker2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.model import Array

    ConvForm = LowRank | InputLowRank | Separable | Tucker2 | CP

Attributes = dict[str, Any]


@dataclass(frozen=True)
class ConvStep:
    """One Conv node: its weight ``(C_out, C_in / group, *kernel)`` and its attributes."""

    weight: Array
    attributes: Attributes


def conv_steps(form: ConvForm, attributes: Mapping[str, Any]) -> list[ConvStep]:
    """Return the convolutions of ``form``, in order, for a node with these ``attributes`` (ONNX Conv, group 1).

    Steps that mix channels run before the stride where they come first: an input mixed with zeros is zero, so padding
    may follow. A kernel cut by axes takes each axis's stride, padding and dilation along.
    """
    kernel = {name: value for name, value in attributes.items() if value != [] and name != "kernel_shape"}
    match form:
        case LowRank(left, right):
            return [_kernel(right, kernel), _mix(left, right.ndim)]
        case InputLowRank(left, right):
            return [_mix(right, left.ndim), _kernel(left, kernel)]
        case Separable(vertical, horizontal):
            return [_kernel(vertical, _along(kernel, 0)), _kernel(horizontal, _along(kernel, 1))]
        case Tucker2(core, out_factor, in_factor):
            return [_mix(in_factor, core.ndim), _kernel(core, kernel), _mix(out_factor, core.ndim)]
        case CP(in_factor, vertical, horizontal, out_factor):
            depthwise = {"group": form.rank}
            return [
                _mix(in_factor, 4),
                _kernel(vertical[:, None, :, None], {**_along(kernel, 0), **depthwise}),
                _kernel(horizontal[:, None, None, :], {**_along(kernel, 1), **depthwise}),
                _mix(out_factor, 4),
            ]


def _mix(matrix: Array, rank: int) -> ConvStep:
    """Return the 1 x 1 convolution of a matrix."""
    return _kernel(matrix.reshape(*matrix.shape, *(1,) * (rank - 2)), {})


def _kernel(weight: Array, attributes: Attributes) -> ConvStep:
    return ConvStep(np.ascontiguousarray(weight), {**attributes, "kernel_shape": list(weight.shape[2:])})


def _along(attributes: Attributes, axis: int) -> Attributes:
    """Return what of a 2-D kernel's attributes concerns one axis; ``auto_pad`` already means each axis by itself."""
    found: Attributes = {name: attributes[name] for name in ("auto_pad",) if name in attributes}
    for name in ("strides", "dilations"):
        if name in attributes:
            found[name] = [attributes[name][place] if place == axis else 1 for place in range(2)]
    if "pads" in attributes:
        found["pads"] = [pad if place % 2 == axis else 0 for place, pad in enumerate(attributes["pads"])]
    return found


def composed(weights: Sequence[Array]) -> Array:
    """Return the one kernel that convolutions in a row stand for, float64; ``weights`` in the order they are applied.

    Each is ``(C_out, C_in / group, *kernel)`` with group 1 or depthwise, and no axis is wider than 1 in two of them,
    so that the composition is a sum over the channels between.
    """
    dense = weights[0].astype(np.float64)
    for weight in weights[1:]:
        wide = weight.astype(np.float64)
        if wide.shape[1] == 1 and wide.shape[0] == dense.shape[0]:
            dense = wide * dense
        else:
            dense = np.einsum("oc...,ci...->oi...", wide, dense)
    return dense
