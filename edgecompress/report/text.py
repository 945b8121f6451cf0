"""Numbers and names as people read them: the one place where bytes, ratios, points and times are formatted."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgecompress.report.model import Accuracy, OutputDifference

UNKNOWN = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def printable(text: str) -> str:
    """Return ``text`` with every character that could steer a terminal or break a page replaced by ``�``."""
    return "".join("�" if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else char for char in text)


def shorten(text: str, limit: int) -> str:
    """Return ``text``, cut in its middle to ``limit`` characters: the ends of layer names tell them apart."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return text[: limit - 1 - tail] + "…" + text[len(text) - tail :]


def format_bytes(size: int | None) -> str:
    """Return a size like ``812 B``, ``17.4 kB``, ``1.08 MB``: three digits, 1 kB = 1000 bytes."""
    return UNKNOWN if size is None else _scaled(size, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: int | None) -> str:
    """Return a number of parameters or operations like ``432``, ``17.4 k``, ``1.08 M``: three digits."""
    return UNKNOWN if count is None else _scaled(count, ("", "k", "M", "G", "T"))


def format_integer(value: int) -> str:
    """Return an integer with commas between thousands."""
    return f"{value:,}"


def format_ratio(ratio: float | None) -> str:
    """Return a ratio like ``6.21×`` or ``12.4×``: three digits."""
    return UNKNOWN if ratio is None else f"{_three_digits(ratio)}{TIMES}"


def format_size_change(compression_ratio: float) -> str:
    """Return ``6.21× smaller``, or ``1.17× larger`` where the stored form outgrew the original."""
    if compression_ratio >= 1:
        return f"{format_ratio(compression_ratio)} smaller"
    return f"{format_ratio(1 / compression_ratio if compression_ratio > 0 else None)} larger"


def format_ms(value: float | None) -> str:
    """Return milliseconds like ``3.61 ms``: three digits."""
    return UNKNOWN if value is None else f"{_three_digits(value)} ms"


def format_db(value: float | None) -> str:
    """Return decibels with one decimal."""
    return UNKNOWN if value is None else f"{_signed_zero(value, 1)} dB"


def format_number(value: float | None) -> str:
    """Return a number of unknown size with three significant digits."""
    return UNKNOWN if value is None else f"{value:.3g}".replace("-", MINUS)


def format_change(drop_points: float, *, percent: bool = True) -> str:
    """Return how the metric moved, with a sign, from a drop: ``−0.3`` is 0.3 worse."""
    change = -drop_points
    text = _signed_zero(abs(change), 2).removesuffix("0") if percent else f"{abs(change):.3g}"
    if float(text) == 0:
        return f"±{text}"
    return (MINUS if change < 0 else "+") + text


def format_metric(value: float | None, *, percent: bool = True) -> str:
    """Return one value of a metric: ``91.5 %``, or four digits in the metric's own unit."""
    if value is None:
        return UNKNOWN
    return f"{value:.2f}".removesuffix("0") + " %" if percent else f"{value:.4g}".replace("-", MINUS)


def is_percent(accuracy: Accuracy) -> bool:
    """Tell whether the metric is a share in percent (top1, top5, agreement), so that its drop is in points."""
    return accuracy.metric.startswith("top") or accuracy.metric in {"agreement", "accuracy"}


def format_sqnr(difference: OutputDifference) -> str:
    """Return the signal-to-noise ratio of an output; no noise at all reads ``identical``."""
    if difference.sqnr_db is None and difference.max_abs == 0:
        return "identical"
    return format_db(difference.sqnr_db)


def format_shape(shape: Sequence[int]) -> str:
    """Return a shape like ``16×3×3×3``; nothing where it is unknown."""
    return TIMES.join(str(size) for size in shape)


def format_share(part: float, whole: float) -> str:
    """Return ``part`` of ``whole`` in percent, ``0 %`` where there is no whole."""
    share = 100 * part / whole if whole > 0 else 0.0
    return f"{share:.0f} %" if share >= 9.95 or share == 0 else f"{share:.1f} %"


def bits_per_parameter(stored_bytes: int | None, parameters: int) -> float | None:
    """Return the stored bits for each parameter of the original layer, ``None`` where that is unknown."""
    return None if stored_bytes is None or parameters <= 0 else 8 * stored_bytes / parameters


def _scaled(value: int, units: Sequence[str]) -> str:
    sign, amount, step = (MINUS if value < 0 else ""), float(abs(value)), 0
    # 999.5 is where three digits would read 1000
    while amount >= 999.5 and step + 1 < len(units):
        amount, step = amount / 1000, step + 1
    number = f"{amount:.0f}" if step == 0 else _three_digits(amount)
    return f"{sign}{number} {units[step]}".strip()


def _three_digits(value: float) -> str:
    """Return ``value`` with three significant digits and no exponent (more before the point where it has them)."""
    if not math.isfinite(value):
        return UNKNOWN
    magnitude = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 9.999 has the one of 10.0
    text = f"{value:.{min(max(2 - magnitude, 0), 6)}f}"
    return text.replace("-", MINUS)


def _signed_zero(value: float, decimals: int) -> str:
    """Return a fixed-point number in which a rounded ``-0.0`` has no sign."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", MINUS)
