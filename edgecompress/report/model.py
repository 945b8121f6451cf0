"""The report as values, and as strict JSON (``docs/report.schema.json`` describes every field with its unit).

Nothing in it depends on the time or on where it was made, apart from what was measured: same input, same report.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgecompress.errors import FormatError
from edgecompress.report import strict_json

SCHEMA_VERSION = 1
UNTOUCHED = "-"  # LayerRow.scheme of a layer that was left alone


def compression_ratio(original_bytes: int, stored_bytes: int) -> float:
    """Return original bytes / stored bytes: how many times smaller the stored form is (above 1 is smaller).

    External data counts on both sides. Raises ``ValueError`` where ``stored_bytes`` is not positive: no file is empty.
    """
    if stored_bytes <= 0:
        raise ValueError(f"stored_bytes must be positive, not {stored_bytes}")
    return original_bytes / stored_bytes


@dataclass(frozen=True)
class StageBytes:
    """Size of the whole model after one stage; the first stage is the original."""

    stage: str
    bytes: int


@dataclass(frozen=True)
class Size:
    """Sizes in bytes, external data counted; ``compression_ratio`` is original file / ``.ecz`` file."""

    original_bytes: int
    onnx_bytes: int
    ecz_bytes: int
    compression_ratio: float
    waterfall: tuple[StageBytes, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Quality of the original and of the compressed model on the same samples.

    Accuracies are percent, any other metric is in its own unit. ``drop_points`` is positive when the compressed model
    is worse; ``standard_error_points`` is that of the drop, paired over the samples.
    ``agreement`` is the share of equal decisions, in percent. ``data`` says in one line on what it was measured.
    """

    metric: str
    original: float | None
    compressed: float | None
    drop_points: float | None
    standard_error_points: float | None
    samples: int
    agreement: float | None
    data: str


@dataclass(frozen=True)
class OutputDifference:
    """How far one output moved: signal-to-noise ratio in dB (``None``: identical or unknown) and largest difference."""

    sqnr_db: float | None
    max_abs: float | None


@dataclass(frozen=True)
class LatencySummary:
    """Timing of one model in milliseconds; ``values_ms`` are the raw runs behind median and p90."""

    init_ms: float
    first_ms: float
    median_ms: float
    p90_ms: float
    samples: int
    peak_rss_bytes: int | None = None
    values_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Latency:
    """Timing of both models on one device; ``ratio`` is compressed / original median (below 1 is faster)."""

    original: LatencySummary | None
    compressed: LatencySummary | None
    ratio: float | None
    device: str
    threads: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerRow:
    """What one layer got, in graph order.

    ``scheme`` reads like ``"svd rank 18, kmeans 32"``; it is ``UNTOUCHED`` where the layer was left alone. ``reason``
    says why a layer was left alone, or why it did not get a stage that was asked for. ``shape`` is the weight's,
    ``(C_out, C_in / groups, *kernel)``. ``stored_bytes`` is its share of the ``.ecz`` file.
    """

    name: str
    op: str
    scheme: str
    rank: int | None
    parameters_before: int
    parameters_after: int
    stored_bytes: int | None
    weight_sqnr_db: float | None
    output_sqnr_db: float | None
    reason: str | None
    shape: tuple[int, ...] = ()
    macs_before: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class LayerPlot:
    """What is drawn of one layer; an empty tuple is not drawn.

    ``singular_values`` fall; ``rank`` is the one chosen. The histogram is of the original weight and has one edge more
    than counts. ``codebook`` holds the values that the compressed weight takes.
    """

    name: str
    singular_values: tuple[float, ...] = ()
    rank: int | None = None
    histogram_edges: tuple[float, ...] = ()
    histogram_counts: tuple[int, ...] = ()
    codebook: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """Which model it was; ``inputs`` and ``outputs`` read like ``"input float32 (N, 3, 32, 32)"``."""

    name: str
    sha256: str
    opset: int
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """What made the report: the exact command, the recipe's hash, and the version of everything that matters."""

    command: str
    recipe_hash: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The evidence of one compression. ``accuracy`` and ``latency`` are ``None`` where they were not measured."""

    schema_version: int = SCHEMA_VERSION
    tool: Tool
    model: ModelFacts
    size: Size
    accuracy: Accuracy | None = None
    outputs: dict[str, OutputDifference] = field(default_factory=dict)
    latency: Latency | None = None
    layers: tuple[LayerRow, ...] = ()
    plots: tuple[LayerPlot, ...] = ()
    warnings: tuple[str, ...] = ()


def to_json(report: Report) -> str:
    """Return the report as strict JSON text (ASCII, keys in a fixed order, a newline at the end).

    NaN and infinity become ``null`` where a field may be unknown; ``PassError`` where it may not.
    """
    return strict_json.dumps(strict_json.encode(report)) + "\n"


def from_json(text: str) -> Report:
    """Return the report that ``to_json`` wrote; unknown keys are ignored, so newer minor additions can be read.

    Raises ``FormatError`` for malformed text, a missing key, a value of the wrong type or another ``schema_version``.
    """
    plain = strict_json.loads(text)
    version = plain.get("schema_version") if isinstance(plain, dict) else SCHEMA_VERSION
    if isinstance(version, int) and version != SCHEMA_VERSION:
        message = f"report.schema_version is {version}; this version of edgecompress reads {SCHEMA_VERSION}"
        raise FormatError(message, hint="use the edgecompress that wrote it, or compress again")
    return strict_json.decode(plain, Report)
