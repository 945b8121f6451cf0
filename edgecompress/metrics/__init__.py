"""Accuracy and distortion of a compressed model against the original, accumulated batch by batch (numpy only)."""

from __future__ import annotations

from edgecompress.metrics.comparison import Comparison, State, add, compare, finish, start
from edgecompress.metrics.definition import AUTO, Metric, check_labels, first_float, parse_metric, resolve
from edgecompress.metrics.distortion import Distortion, distortion, merge
from edgecompress.metrics.scores import score

__all__ = [
    "AUTO",
    "Comparison",
    "Distortion",
    "Metric",
    "State",
    "add",
    "check_labels",
    "compare",
    "distortion",
    "finish",
    "first_float",
    "merge",
    "parse_metric",
    "resolve",
    "score",
    "start",
]
