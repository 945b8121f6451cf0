"""Inputs drawn at random, for checking that two models agree where there is no data; never for calibrating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgecompress.errors import ModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    from edgecompress.model import TensorSpec

Array = npt.NDArray[Any]

FREE_SIZE = 8  # a free dimension that is not the batch


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read ``NAME=1,16`` into the input's name and its dimensions. Raises ``UsageError`` where it is malformed."""
    name, equals, numbers = text.rpartition("=")
    dims = [part.strip() for part in numbers.split(",")]
    # isdecimal alone would accept other scripts' digits and numbers of any length
    if (
        not name.strip()
        or not equals
        or not all(d.isascii() and d.isdecimal() and 0 < int(d[:10]) < 2**31 for d in dims)
    ):
        raise UsageError(
            f"--shape {text!r} is not NAME=DIMS", hint="name an input and its positive dimensions: --shape tokens=1,16"
        )
    return name.strip(), tuple(int(dim) for dim in dims)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[TensorSpec]) -> None:
    """Raise ``UsageError`` where a shape is for no input, or differs from what an input fixes."""
    by_name = {spec.name: spec for spec in inputs}
    for name, dims in shapes.items():
        if name not in by_name:
            raise UsageError(f"--shape: the model has no input {name!r}", hint=did_you_mean(name, by_name))
        fixed = by_name[name].shape
        if len(fixed) != len(dims) or any(a not in (None, b) for a, b in zip(fixed, dims, strict=True)):
            wanted = ",".join("?" if size is None else str(size) for size in fixed)
            raise UsageError(
                f"--shape {name}={','.join(map(str, dims))} does not fit the model's {name}={wanted or 'scalar'}",
                hint="only dimensions shown as ? are free",
            )


def random_feeds(
    inputs: Sequence[TensorSpec],
    *,
    rows: int,
    integer_limits: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    seed: int = 0,
) -> dict[str, Array]:
    """Draw feeds by input name: ``rows`` where the leading axis is free, 8 on other free axes, or as ``shapes`` says.

    Floats are standard normal, whole numbers uniform below ``integer_limits`` where known and else 0 or 1.
    Raises ``UsageError`` for shapes that do not fit, ``ModelError`` for inputs that are not numbers.
    """
    check_shapes(shapes, inputs)
    generator = np.random.default_rng(seed)
    feeds = {}
    for spec in inputs:
        dims = shapes.get(spec.name) or _dims(spec, rows)
        feeds[spec.name] = _draw(generator, spec, dims, integer_limits.get(spec.name, 2))
    return feeds


def _dims(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """Fill in the free dimensions."""
    filled = [FREE_SIZE if size is None else size for size in spec.shape]
    if spec.shape and spec.shape[0] is None:
        filled[0] = rows
    return tuple(filled)


def _draw(generator: np.random.Generator, spec: TensorSpec, dims: tuple[int, ...], limit: int) -> Array:
    """Draw one input."""
    dtype = np.dtype(spec.dtype)
    if dtype == np.bool_:
        return generator.integers(0, 2, dims).astype(np.bool_)
    if np.issubdtype(dtype, np.integer):
        top = min(max(limit, 1), int(np.iinfo(dtype).max), int(np.iinfo(np.int64).max))
        return np.asarray(generator.integers(0, top, dims), dtype)
    if np.issubdtype(dtype, np.floating) or dtype.kind == "V":  # bfloat16 and float8 are of kind V
        return np.asarray(generator.standard_normal(dims)).astype(dtype)
    raise ModelError(
        f"input {spec.name!r} holds {dtype}: no random values can be drawn for it",
        hint="only models of numbers can be measured: export the part behind the tokenizer",
    )
