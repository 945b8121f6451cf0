"""What a factorized form of a weight costs, known before it is solved: parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

FormName = Literal["svd", "svd_bias", "svd_in", "separable", "tucker2", "cp", "spectral"]
"""``LowRank``, ``AffineLowRank``, ``InputLowRank``, ``Separable``, ``Tucker2``, ``CP`` and ``Spectral`` by name.

Shapes of a grouped convolution are those of one group, ``(O / groups, I / groups, *kernel)``, here and wherever a form
is sized; what is counted is then one group's, too.
"""

# (weights of one step, where it runs): "in" before the stride, "out" after it, "mixed" after that of the first axis.
_Step = tuple[int, Literal["in", "mixed", "out"]]


def fits(form: FormName, shape: tuple[int, ...]) -> bool:
    """Tell whether ``form`` is defined, and not the same as a simpler one, for a canonical weight of ``shape``."""
    if form in ("separable", "cp"):
        return len(shape) == 4 and min(shape[2:]) > 1
    if form in ("svd_in", "tucker2"):
        return len(shape) > 2 and int(np.prod(shape[2:])) > 1
    return len(shape) >= 2


def count_parameters(form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Return how many values a form of a canonical weight of ``shape`` stores; ``svd_bias`` with the inner bias."""
    if form == "spectral":
        return ranks[0] * ranks[1]
    bias = ranks[0] if form == "svd_bias" else 0
    return bias + sum(weights for weights, _ in _steps(form, shape, ranks))


def dense_parameters(form: FormName, shape: tuple[int, ...]) -> int:
    """Return how many values a form takes the place of: those of the weight, for ``svd_bias`` with its bias."""
    return int(np.prod(shape, dtype=np.int64)) + (shape[0] if form == "svd_bias" else 0)


def count_macs(
    form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...], *, inputs: Sequence[int], outputs: Sequence[int]
) -> int:
    """Return the multiply-accumulates of a form for one row of a batch.

    ``inputs`` and ``outputs`` are the layer's spatial sizes before and after its stride and padding, one per kernel
    axis. A 1 x 1 step before the kernel runs at every input position; the ``kh x 1`` step of a separable form at
    ``outputs[0]`` rows and ``inputs[1]`` columns. For Gemm and MatMul both are the sizes of the remaining axes, ``()``
    for a single vector.
    """
    positions = {
        "in": int(np.prod(inputs, dtype=np.int64)),
        "mixed": int(np.prod([*outputs[:1], *inputs[1:]], dtype=np.int64)),
        "out": int(np.prod(outputs, dtype=np.int64)),
    }
    return sum(weights * positions[where] for weights, where in _steps(form, shape, ranks))


def _steps(form: FormName, shape: tuple[int, ...], ranks: tuple[int, ...]) -> list[_Step]:
    """Return the weights of every step in the order of execution, and where it runs."""
    outputs, channels, kernel = shape[0], shape[1], shape[2:]
    points = int(np.prod(kernel, dtype=np.int64))
    first, last = ranks[0], ranks[-1]
    if form in ("svd", "svd_bias"):
        return [(first * channels * points, "out"), (outputs * first, "out")]
    if form == "svd_in":
        return [(first * channels, "in"), (outputs * first * points, "out")]
    if form == "separable":
        return [(first * channels * kernel[0], "mixed"), (outputs * first * kernel[1], "out")]
    if form == "tucker2":
        return [(last * channels, "in"), (first * last * points, "out"), (outputs * first, "out")]
    if form == "cp":
        return [
            (first * channels, "in"),
            (first * kernel[0], "mixed"),
            (first * kernel[1], "out"),
            (outputs * first, "out"),
        ]
    return [(outputs * channels * points, "out")]
