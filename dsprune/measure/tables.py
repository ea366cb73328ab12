"""Plain-text tables for the screen: columns two spaces apart, one rule under the headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["render_table"]

_NUMERIC = re.compile(r"[-+]?\d|-?$")
"""Cells that make a column one of numbers: those that begin with a digit, and those that stand for a missing one."""


def render_table(headers: Sequence[str], rows: Iterable[Sequence[str]], *, align: str | None = None) -> str:
    """A table as text, without a newline at the end.

    Args:
        headers: one line each, as many as there are columns.
        rows: cells, one line each.
        align: one of `<`, `>` and `^` for each column; by default columns of numbers go right, others left.

    Raises:
        ValueError: a row or `align` with another number of columns than `headers`.
    """
    cells = [list(row) for row in rows]
    for what, given in [("align", align or headers), *(("a row", row) for row in cells)]:
        if len(given) != len(headers):
            raise ValueError(f"{what} has {len(given)} columns and the headers have {len(headers)}: {given}")
    columns = list(zip(headers, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    sides = align or "".join(">" if _is_numeric(column[1:]) else "<" for column in columns)

    def line(row: Sequence[str]) -> str:
        padded = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def _is_numeric(cells: Sequence[str]) -> bool:
    return any(cells) and all(_NUMERIC.match(cell) for cell in cells)
