"""Checks of a split's columns: each mistake is one line that says where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsprune.errors import DataError
from dsprune.tasks.sources.splits import Split

__all__ = ["blank_texts", "check_columns", "check_text", "refuse_first"]


def check_columns(split: Split, columns: Sequence[str], task: str) -> None:
    """Refuse a split without rows, or without one of the columns.

    Raises:
        DataError: naming what is there.
    """
    if len(split) == 0:
        raise DataError(f"{split.origin}: the split is empty")
    for column in columns:
        if column not in split.columns:
            there = ", ".join(split.columns)
            raise DataError(
                f"{split.origin}: no column '{column}' of task '{task}'; there is {there}; if it is one of them, say "
                f'data.columns = {{{column} = "ITS NAME"}}'
            )


def check_text(split: Split, columns: Iterable[str]) -> None:
    """Refuse columns that hold anything but strings.

    Raises:
        DataError: naming the first wrong value.
    """
    for column in columns:
        refuse_first(split, column, (not isinstance(v, str) for v in split.columns[column]), "expected text")


def blank_texts(split: Split, columns: Iterable[str]) -> tuple[str, ...]:
    """What is to be said of rows whose text is blank; nothing where there are none."""
    rows = {name: [row for row, text in enumerate(split.columns[name]) if not text.strip()] for name in columns}
    return tuple(
        f"{split.name}: {len(blank)} of {len(split)} rows have a blank '{_source_name(split, name)}', the first is row "
        f"{blank[0]} (from 0)"
        for name, blank in rows.items()
        if blank
    )


def refuse_first(split: Split, column: str, wrong: Iterable[bool], wanted: str, *, hint: str = "") -> None:
    """Stop at the first wrong value of a column.

    Args:
        split: that holds the column.
        column: its name.
        wrong: [rows] whether each value is wrong.
        wanted: what the message asks for.
        hint: what it says at the end.

    Raises:
        DataError: naming the row and what was found there.
    """
    row = next((row for row, is_wrong in enumerate(wrong) if is_wrong), None)
    if row is not None:
        found = repr(split.columns[column][row])
        where = f"row {row} (from 0), column '{_source_name(split, column)}'"
        raise DataError(f"{split.origin}: {where}: {wanted}, found {found[:60]}{hint}")


def _source_name(split: Split, column: str) -> str:
    """What the user calls a column."""
    return split.renamed.get(column, column)
