"""The pictures of the sources: a scatter plot as SVG written by hand, photos side by side by pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[Any]

_WIDTH, _HEIGHT, _MARGIN = 640, 400, 46
_COLOURS = ("#15616d", "#c2451e", "#7a5ea8")
_PAPER, _INK, _SOFT, _RULE = "#fdfcf9", "#1f1e1b", "#6a665e", "#e3dfd5"


def write(path: Path, content: bytes) -> None:
    """Write a file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def scatter(groups: Sequence[tuple[str, Array]], title: str) -> str:
    """Return an SVG of up to three named groups of points ``(n, 2)``; each has its own colour and mark."""
    everything = np.concatenate([points for _, points in groups])
    low, high = everything.min(axis=0), everything.max(axis=0)
    inner = np.array([_WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN])
    scale = float(np.min(inner / (high - low)))  # the same for both axes: distances are distances
    offset = np.array([_MARGIN, _HEIGHT - _MARGIN]) + (inner - scale * (high - low)) / 2 * [1, -1]

    def place(points: Array) -> Array:
        return np.asarray(offset + (points - low) * scale * [1, -1])

    body = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="{_PAPER}"/>', _zero_lines(place(np.zeros((1, 2)))[0])]
    for number, (name, points) in enumerate(groups):
        body += [_mark(number, x, y) for x, y in place(points)]
        body.append(_mark(number, _MARGIN + 130 * number, 20))
        body.append(f'<text x="{_MARGIN + 130 * number + 11}" y="24.5" fill="{_INK}">{name}</text>')
    x, y = place(np.zeros((1, 2)))[0]
    body.append(f'<text x="{_WIDTH - 12}" y="{y + 18:.1f}" text-anchor="end">first component</text>')
    body.append(f'<text x="{x + 7:.1f}" y="48">second component</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img" font-family="sans-serif" font-size="13" fill="{_SOFT}"><title>{title}</title>'
    )
    return head + "\n" + "\n".join(body) + "\n</svg>\n"


def _zero_lines(origin: Array) -> str:
    x, y = origin
    return f'<path d="M{x:.1f} 38V{_HEIGHT - 32}M12 {y:.1f}H{_WIDTH - 12}" stroke="{_RULE}" fill="none"/>'


def _mark(kind: int, x: float, y: float) -> str:
    """Return a disc, a square or a triangle: the colour is not the only difference."""
    style = f'fill="{_COLOURS[kind]}" fill-opacity=".75"'
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {style}/>'
    if kind == 1:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" {style}/>'
    return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z" {style}/>'


def grid(tiles: Sequence[tuple[str, Array]]) -> Image.Image:
    """Return pictures ``(height, width, 3)`` of one size, two in a row at 400 pixels, each with its caption below."""
    width, caption, gap = 400, 24, 8
    height = round(tiles[0][1].shape[0] * width / tiles[0][1].shape[1])
    rows = -(-len(tiles) // 2)
    sheet = Image.new("RGB", (2 * width + gap, rows * (height + caption)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (text, pixels) in enumerate(tiles):
        x, y = number % 2 * (width + gap), number // 2 * (height + caption)
        sheet.paste(Image.fromarray(pixels).resize((width, height)), (x, y))
        draw.text((x + 4, y + height + 3), text, fill=_INK, font_size=15)
    return sheet
