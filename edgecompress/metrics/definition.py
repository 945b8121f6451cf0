"""Which metric judges a model, and what labels it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgecompress.errors import DataError, did_you_mean
from edgecompress.imports import is_reference

Array = npt.NDArray[Any]

NAMES = ("top1", "topk", "rmse", "agreement")


@dataclass(frozen=True)
class Metric:
    """How outputs are judged.

    ``auto`` is top1 where there are labels and an (N, classes) output, rmse where there are labels of the output's own
    shape, else agreement. ``k`` is for topk, ``function`` the ``package.module:function`` of a custom metric.
    """

    name: Literal["auto", "top1", "topk", "rmse", "agreement", "function"]
    k: int = 1
    function: str = ""

    @property
    def title(self) -> str:
        """The metric as reports show it: ``top5``, ``rmse``, ``package.module:function``."""
        return f"top{self.k}" if self.name == "topk" else self.function or self.name


AUTO = Metric("auto")
_SIMPLE = {name: Metric(name) for name in ("top1", "rmse", "agreement")}


def parse_metric(text: object, k: object, where: str) -> Metric:
    """Read a metric's name, and the k of topk. Raises ``DataError``, naming ``where``, where it is none."""
    if not isinstance(text, str):
        raise DataError(f"{where}: metric = {text!r} is not allowed", hint=f"it must be one of {', '.join(NAMES)}")
    if text == "topk":
        if type(k) is not int or k < 1:
            raise DataError(f"{where}: metric topk needs k, a positive whole number, not {k!r}", hint="add k = 5")
        return Metric("topk", k=k)
    if ":" in text:
        if not is_reference(text):
            raise DataError(f"{where}: metric {text!r} is not package.module:function", hint="for example mymetrics:f1")
        return Metric("function", function=text)
    if text not in _SIMPLE:
        raise DataError(
            f"{where}: there is no metric {text!r}", hint=did_you_mean(text, (*NAMES, "package.module:function"))
        )
    return _SIMPLE[text]


def check_labels(metric: Metric, labels: Array | None, where: str) -> None:
    """Raise ``DataError`` where ``labels`` cannot serve a metric that was asked for by name."""
    if metric.name not in ("top1", "topk"):
        return
    if labels is None:
        raise DataError(f"{where}: metric {metric.title} needs labels", hint='name them, or use metric = "agreement"')
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        shape = ", ".join(["N", *map(str, labels.shape[1:])])
        raise DataError(
            f"{where}: labels are {labels.dtype} of shape ({shape}), {metric.title} needs one whole number a row",
            hint="class numbers counted from 0: convert them with .astype(np.int64)",
        )


def class_axis(shape: tuple[int | None, ...]) -> bool:
    """Tell whether a shape is (N, classes), with more than one class; axes of one element after them are allowed."""
    return len(shape) >= 2 and shape[1] != 1 and all(size == 1 for size in shape[2:])


def resolve(metric: Metric, labels: Array | None, output_shape: tuple[int | None, ...]) -> Metric:
    """Return the metric that ``auto`` stands for, given the shape of the first float output; others as they are.

    Raises ``DataError`` where the labels fit no metric.
    """
    if metric.name != "auto":
        return metric
    if labels is None:
        return Metric("agreement")
    same_shape = bool(output_shape) and math.prod(labels.shape[1:]) == math.prod(size or 1 for size in output_shape[1:])
    if same_shape and not (class_axis(output_shape) and np.issubdtype(labels.dtype, np.integer)):
        return Metric("rmse")
    if class_axis(output_shape):
        check_labels(Metric("top1"), labels, "the data set")
        return Metric("top1")
    return Metric("agreement")


def first_float(outputs: Mapping[str, Array]) -> str | None:
    """Return the name of the first output that holds floats, None where there is none."""
    for name, values in outputs.items():
        # bfloat16 has the kind V, which NumPy does not count as floating
        if isinstance(values, np.ndarray) and (np.issubdtype(values.dtype, np.floating) or values.dtype.kind == "V"):
            return name
    return None
