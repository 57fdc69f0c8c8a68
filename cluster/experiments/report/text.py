"""A report as text for the terminal, as Markdown, and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence

from cluster.experiments.report.parts import POINTS, Part, Table

WIDTH = 110  # of a paragraph


def terminal(parts: Sequence[Part]) -> str:
    """Aligned tables, with a paragraph below each."""
    blocks = []
    for part in parts:
        blocks += ["\n".join([part.title, *textwrap.wrap(part.about, WIDTH)]), *map(_aligned, part.tables)]
    return "\n\n".join(blocks)


def _aligned(table: Table) -> str:
    rows = [table.header, *table.rows] if any(table.header) else [*table.rows]
    if not table.rows:
        return f"{table.title}: none yet"
    columns = [_column([row[n] for row in rows], is_first=n == 0) for n in range(len(table.header))]
    lines = [f"  {'  '.join(cells)}".rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join([table.title, *lines, *textwrap.wrap(table.note, WIDTH)])


def _column(cells: list[str], is_first: bool) -> list[str]:
    """Cells of one width: numbers end together, texts begin together."""
    width = max(map(len, cells))
    is_text = is_first or any(cell[:1].isalpha() for cell in cells[1:])
    return [f"{cell:<{width}}" if is_text else f"{cell:>{width}}" for cell in cells]


def markdown(parts: Sequence[Part]) -> str:
    """Headings and pipe tables."""
    lines = []
    for part in parts:
        lines += [f"# {part.title}", "", part.about, ""]
        for table in part.tables:
            lines += [f"## {table.title}", "", _piped(table.header), _piped(["---"] * len(table.header))]
            lines += [*map(_piped, table.rows), "", *([table.note, ""] if table.note else [])]
    return "\n".join(lines).rstrip()


def _piped(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def comma_separated(parts: Sequence[Part]) -> str:
    """One line per curve and batch."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("report", *POINTS))
    writer.writerows((part.title, *row) for part in parts for row in part.points)
    return buffer.getvalue().rstrip()
