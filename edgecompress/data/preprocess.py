"""From what a file holds to what a model takes: channel order, scale, mean, std, layout, type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError

if TYPE_CHECKING:
    from edgecompress.model import TensorSpec

Array = npt.NDArray[Any]
Layout = Literal["NCHW", "NHWC", "flat"]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """The steps in the order in which they are applied; docs/data.md describes each.

    ``resize``, ``crop`` and ``size`` (height, width) are for pictures in files only. ``mean`` and ``std`` have one
    number, or one per element of the last axis (channels of a picture in the model's channel order, columns of a
    table). A missing ``dtype`` means the type of the model's input.
    """

    resize: int | Literal["cover"] | None = None
    crop: Literal["centre", "none"] = "none"
    size: tuple[int, int] | None = None
    channel_order: Literal["RGB", "BGR"] = "RGB"
    binarize: float | None = None
    scale: float | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    layout: Layout | None = None
    dtype: str | None = None


def apply(steps: Preprocess, values: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Return ``values`` (rows, ..., channels) after ``steps``, as ``steps.dtype`` or else ``dtype``.

    Pictures are (rows, height, width) or (rows, height, width, channels). Raises ``DataError``, naming ``what``, where
    a step does not fit.
    """
    if steps.layout is not None and values.ndim == 3:
        values = values[..., np.newaxis]
    if steps.channel_order == "BGR":
        _require(values.ndim == 4 and values.shape[-1] == 3, what, "channel_order", "pictures of 3 channels", values)
        values = values[..., ::-1]
    values = _arithmetic(steps, values, what)
    if steps.layout in ("NCHW", "NHWC"):
        _require(values.ndim == 4, what, f"layout {steps.layout}", "(rows, height, width[, channels])", values)
    if steps.layout == "NCHW":
        values = np.moveaxis(values, -1, 1)
    elif steps.layout == "flat":
        values = values.reshape(len(values), -1)
    return np.ascontiguousarray(_cast(values, np.dtype(steps.dtype) if steps.dtype else dtype, what))


def _arithmetic(steps: Preprocess, values: Array, what: str) -> Array:
    """Threshold or scale, then subtract the mean and divide by the standard deviation, in float32 or wider."""
    if steps.binarize is not None:
        values = (values > steps.binarize).astype(np.float32)
    if steps.scale is None and not steps.mean and not steps.std:
        return values
    working = np.result_type(values.dtype, np.float32)
    values = values.astype(working)
    if steps.scale is not None:
        values = values * working.type(steps.scale)
    for name, numbers in (("mean", steps.mean), ("std", steps.std)):
        if numbers:
            allowed = f"a last axis of {len(numbers)}, its number of elements,"
            _require(len(numbers) in (1, values.shape[-1]), what, name, allowed, values)
            operand = np.asarray(numbers, working)
            values = values - operand if name == "mean" else values / operand
    return values


def _cast(values: Array, dtype: np.dtype[Any], what: str) -> Array:
    """Convert to ``dtype``; whole-number types round, and a value outside their range is an error."""
    if values.dtype == dtype:
        return values
    if np.issubdtype(dtype, np.integer) and values.size:
        limits = np.iinfo(dtype)
        values = np.rint(values) if np.issubdtype(values.dtype, np.floating) else values
        if values.min() < limits.min or values.max() > limits.max:
            span = f"{values.min()} to {values.max()}"
            raise DataError(
                f"{what}: preprocessed values run from {span}, {dtype} holds {limits.min} to {limits.max}",
                hint="check scale, mean and std in [preprocess]",
            )
    return values.astype(dtype)


def _require(condition: bool, what: str, step: str, allowed: str, values: Array) -> None:
    """Raise ``DataError`` where a step does not fit the shape of the data."""
    if not condition:
        shape = ("rows", *values.shape[1:])
        raise DataError(
            f"{what}: {step} needs {allowed}, but the data has shape ({', '.join(map(str, shape))})",
            hint="correct [preprocess] in the dataset.toml",
        )


@dataclass(frozen=True)
class PictureShape:
    """What pictures become: ``size`` (height, width), ``channels`` 1 or 3, and the layout of the model's input."""

    size: tuple[int, int]
    channels: int
    layout: Layout


def picture_shape(spec: TensorSpec, steps: Preprocess) -> PictureShape:
    """Infer size, channels and layout from the model's input where ``steps`` does not say them.

    Raises ``DataError`` where the input is not one that pictures fit.
    """
    layout = steps.layout or _layout_of(spec)
    shape = spec.shape
    if layout == "flat":
        return PictureShape(*_flat_shape(spec, steps), layout)
    axes = {"NCHW": (1, 2, 3), "NHWC": (3, 1, 2)}[layout]
    if len(shape) != 4 or shape[axes[0]] not in (1, 3, None):
        raise _no_pictures(spec, f"as {layout} it would need 4 axes and 1 or 3 channels")
    channels = shape[axes[0]] or 3
    height, width = steps.size or (shape[axes[1]], shape[axes[2]])
    if height is None or width is None:
        raise DataError(
            f"input {spec.name!r} leaves the size of its pictures open: {describe_shape(spec.shape)}",
            hint="write a dataset.toml with size = [height, width] under [preprocess] (docs/data.md)",
        )
    return PictureShape((height, width), channels, layout)


def _layout_of(spec: TensorSpec) -> Layout:
    """Tell NCHW from NHWC by the axis that has 1 or 3 elements."""
    if len(spec.shape) == 4:
        if spec.shape[1] in (1, 3):
            return "NCHW"
        if spec.shape[3] in (1, 3):
            return "NHWC"
    raise _no_pictures(spec, "it has no axis of 1 or 3 channels in 4 axes")


def _flat_shape(spec: TensorSpec, steps: Preprocess) -> tuple[tuple[int, int], int]:
    """Return the size and channels of pictures that are flattened to one axis of known length."""
    length = spec.shape[1] if len(spec.shape) == 2 else None
    if steps.size is None or length is None:
        raise _no_pictures(spec, 'layout "flat" needs size = [height, width] and an input of shape (rows, length)')
    channels, rest = divmod(length, steps.size[0] * steps.size[1])
    if rest or channels not in (1, 3):
        raise _no_pictures(spec, f"{steps.size[0]} x {steps.size[1]} pixels of 1 or 3 channels do not make {length}")
    return steps.size, channels


def _no_pictures(spec: TensorSpec, why: str) -> DataError:
    """Build the error for an input that pictures do not fit."""
    return DataError(
        f"pictures do not fit input {spec.name!r} of shape {describe_shape(spec.shape)}: {why}",
        hint="give an .npz with the model's input names, or a dataset.toml with [preprocess] layout and size",
    )


def describe_shape(shape: tuple[int | None, ...]) -> str:
    """Return ``(N, 3, 32, 32)``: the leading free axis is N, other free ones are ``?``."""
    names = [("N" if axis == 0 else "?") if size is None else str(size) for axis, size in enumerate(shape)]
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"
