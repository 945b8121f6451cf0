"""What a section prints: text and tables in Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """``data`` is the folder of the benchmark data, ``pictures`` where pictures are written; without one none are."""

    data: Path | None = None
    pictures: Path | None = None


@dataclass(frozen=True)
class Table:
    """A table with the text before and after it; the cells of a row are as many as the headers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    before: str = ""
    after: str = ""


def markdown(table: Table) -> str:
    """Return a table as Markdown. Raises ``ValueError`` for a row of another length than the headers."""
    lines = [_line(table.headers), "|" + "---|" * len(table.headers)]
    for row in table.rows:
        if len(row) != len(table.headers):
            raise ValueError(f"row {row} has {len(row)} cells, not {len(table.headers)}")
        lines.append(_line(row))
    title = f"### {table.title}" if table.title else ""
    return "\n\n".join(part for part in (title, table.before, "\n".join(lines), table.after) if part)


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"
