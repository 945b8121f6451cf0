"""A factorized convolution as the plain convolutions it runs as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgecompress.factorize.factors import ChannelForm, Grouped
from edgecompress.factorize.forms import CP, AffineLowRank, InputLowRank, LowRank, Separable, Tucker2

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgecompress.model import Array

ConvForm = ChannelForm | AffineLowRank | Grouped
Attributes = dict[str, Any]


@dataclass(frozen=True)
class ConvStep:
    """One Conv node: its weight ``(C_out, C_in / group, *kernel)`` and its attributes."""

    weight: Array
    attributes: Attributes


def conv_steps(form: ConvForm, attributes: Mapping[str, Any]) -> list[ConvStep]:
    """Return the convolutions of ``form``, in order, for a node with these ``attributes`` (of an ONNX Conv).

    Steps that mix channels run before the stride where they come first: an input mixed with zeros is zero, so padding
    may follow. A kernel cut by axes takes each axis's stride, padding and dilation along. The steps of groups run side
    by side. The bias of an ``AffineLowRank`` belongs to the first step.
    """
    kernel = {
        name: value for name, value in attributes.items() if value != [] and name not in ("kernel_shape", "group")
    }
    if isinstance(form, Grouped):
        return [_side_by_side(steps) for steps in zip(*(_steps(part, kernel) for part in form.parts), strict=True)]
    return _steps(form, kernel)


def _side_by_side(steps: Sequence[ConvStep]) -> ConvStep:
    """Join one step of every group."""
    inner = steps[0].attributes.get("group", 1)
    weight = np.concatenate([step.weight for step in steps])
    return ConvStep(weight, {**steps[0].attributes, "group": inner * len(steps)})


def _steps(form: ChannelForm | AffineLowRank, kernel: Attributes) -> list[ConvStep]:
    match form:
        case LowRank(left, right) | AffineLowRank(left, right, _):
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
