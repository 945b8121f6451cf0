"""Made-up reports that look like real ones, for the tests of the report and to look at its page."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import numpy as np
from hypothesis import strategies as st

from edgecompress.report import strict_json
from edgecompress.report.model import (
    Accuracy,
    Latency,
    LatencySummary,
    LayerPlot,
    LayerRow,
    ModelFacts,
    OutputDifference,
    Report,
    Size,
    StageBytes,
    Tool,
    compression_ratio,
)

TOOL = Tool(
    command="edgecompress compress resnet20_cifar10.onnx -o out --data cifar10.toml --factorize svd --keep 0.5",
    recipe_hash="sha256:3f7a1c0be2d94c55a3f1f2b7c3a8d9e06655",
    versions={"edgecompress": "0.1.0", "python": "3.11.7", "numpy": "2.4.6", "onnx": "1.20.0", "onnxruntime": "1.31.1"},
)
FACTS = ModelFacts(
    name="resnet20_cifar10",
    sha256="9b1f0c4de2aa4c0ab8f1c2d3e4f5061728394a5b6c7d8e9f00112233445566aa",
    opset=13,
    inputs=("input float32 (N, 3, 32, 32)",),
    outputs=("logits float32 (N, 10)",),
)


def resnet_like(blocks: int = 3, *, prefix: str = "layer") -> Report:
    """Return the report of a residual net of ``6 * blocks + 2`` layers, compressed by SVD and k-means."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[str, tuple[int, ...], int]] = [("conv1.weight", (16, 3, 3, 3), 32)]
    for stage, (width, side) in enumerate(((16, 32), (32, 16), (64, 8)), start=1):
        for block in range(blocks):
            before = width // 2 if stage > 1 and block == 0 else width
            shapes.append((f"{prefix}{stage}.{block}.conv1.weight", (width, before, 3, 3), side))
            shapes.append((f"{prefix}{stage}.{block}.conv2.weight", (width, width, 3, 3), side))
    shapes.append(("linear.weight", (10, 64), 1))
    layers = tuple(_layer(name, shape, side, rng) for name, shape, side in shapes)
    biggest = sorted(layers, key=lambda row: -row.parameters_before)[:8]
    original = 4 * sum(row.parameters_before for row in layers) + 14_000
    ecz = sum(row.stored_bytes or 0 for row in layers) + 3_900
    onnx = sum(row.parameters_after for row in layers) + 24_000
    stages = (("original", original), ("svd", int(original * 0.53)), ("k-means", onnx), ("huffman (.ecz)", ecz))
    return Report(
        tool=TOOL,
        model=FACTS,
        size=Size(original, onnx, ecz, compression_ratio(original, ecz), tuple(StageBytes(*stage) for stage in stages)),
        accuracy=Accuracy("top1", 91.5, 91.2, 0.3, 0.42, 1000, 97.3, "cifar10.toml, test split: 1,000 images"),
        outputs={"logits": OutputDifference(24.31, 1.204)},
        latency=Latency(_timing(3.61, 0.05, rng), _timing(2.74, 0.04, rng), 0.759, "local", 1),
        layers=layers,
        plots=tuple(_plot(row, rng) for row in biggest),
    )


def minimal() -> Report:
    """Return the emptiest report there can be: nothing measured, no layer found."""
    return Report(
        tool=Tool("edgecompress compress m.onnx -o out", "sha256:0"),
        model=ModelFacts("m", "0" * 64, 9),
        size=Size(120, 120, 140, compression_ratio(120, 140)),
    )


def _layer(name: str, shape: tuple[int, ...], side: int, rng: np.random.Generator) -> LayerRow:
    before = int(np.prod(shape))
    rows, columns = shape[0], before // shape[0]
    rank = max(1, int(0.5 * before / (rows + columns)))
    after = rank * (rows + columns)
    op = "Conv" if len(shape) == 4 else "Gemm"
    macs = before * side * side
    if rows < 17 and name.endswith("0.conv1.weight"):
        reason = "its output is 3.1 dB worse than the tolerance"
        return LayerRow(name, op, "-", None, before, before, before * 4, None, None, reason, shape, macs, macs)
    if before < 1000:
        scheme, kept, stored, reason = (
            "kmeans 32",
            None,
            int(before * 0.62) + 64,
            "rank 5 would not lower its parameters",
        )
        after = before
    else:
        scheme, kept, stored, reason = f"svd rank {rank}, kmeans 32", rank, int(after * 0.58) + 70, None
    quality = float(rng.uniform(14, 22))
    row = (name, op, scheme, kept, before, after, stored, quality, quality + 6.5, reason, shape)
    return LayerRow(*row, macs_before=macs, macs_after=int(macs * after / before))


def _plot(row: LayerRow, rng: np.random.Generator) -> LayerPlot:
    count = min(row.shape[0], row.parameters_before // row.shape[0])
    index = np.arange(count)
    fall = np.exp(-index / (0.25 * count)) + 0.06 * (1 - index / count)
    values = np.sort(fall * rng.uniform(0.93, 1.07, count))[::-1] * 3.1
    weights = np.concatenate([rng.normal(0, 0.06, 6000), rng.laplace(0, 0.05, 3000)])
    counts, edges = np.histogram(weights, bins=80)
    codebook = np.quantile(weights, (np.arange(32) + 0.5) / 32) * 1.3
    return LayerPlot(
        row.name,
        tuple(map(float, values)),
        row.rank,
        tuple(map(float, edges)),
        tuple(map(int, counts)),
        tuple(map(float, codebook)),
    )


def _timing(median: float, spread: float, rng: np.random.Generator) -> LatencySummary:
    values = median * (0.985 + rng.gamma(1.6, spread, 200) * 0.5)
    values[[17, 90]] *= 2.4
    return LatencySummary(
        init_ms=14.2,
        first_ms=median * 2.1,
        median_ms=float(np.median(values)),
        p90_ms=float(np.quantile(values, 0.9)),
        samples=200,
        peak_rss_bytes=68_400_000,
        values_ms=tuple(float(round(value, 4)) for value in values),
    )


def reports() -> st.SearchStrategy[Report]:
    """Return a strategy for any report at all: names of any characters, numbers up to those of float32."""
    return _any_of(Report)


def _any_of(kind: Any) -> st.SearchStrategy[Any]:
    inner = strict_json.optional_of(kind)
    if inner is not None:
        return st.none() | _any_of(inner)
    if typing.get_origin(kind) is tuple:
        return st.lists(_any_of(typing.get_args(kind)[0]), max_size=4).map(tuple)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(_any_of(str), _any_of(typing.get_args(kind)[1]), max_size=3)
    if dataclasses.is_dataclass(kind):
        fields = {name: _any_of(part) for name, part in strict_json.field_types(kind).items()}
        if kind is Report:
            fields["schema_version"] = st.just(1)
        return st.builds(kind, **fields)
    plain = {
        int: st.integers(0, 2**40) | st.integers(0, 5),
        float: st.floats(-(2.0**126), 2.0**126) | st.floats(0, 100),
        # a lone surrogate is written as an escape: see the test of its own
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    }
    return plain[kind]
