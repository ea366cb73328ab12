"""Checks of a split's columns: each mistake is one line that says where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsprune.errors import DataError
from dsprune.tasks.sources import Split

__all__ = ["check_columns", "check_text", "refuse_first"]


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
            raise DataError(f"{split.origin}: no column '{column}' of task '{task}'; there is {there}")


def check_text(split: Split, columns: Iterable[str]) -> None:
    """Refuse columns that hold anything but strings.

    Raises:
        DataError: naming the first wrong value.
    """
    for column in columns:
        refuse_first(split, column, (not isinstance(v, str) for v in split.columns[column]), "expected text")


def refuse_first(split: Split, column: str, wrong: Iterable[bool], wanted: str) -> None:
    """Stop at the first wrong value of a column.

    Args:
        split: that holds the column.
        column: its name.
        wrong: [rows] whether each value is wrong.
        wanted: what the message asks for.

    Raises:
        DataError: naming the row and what was found there.
    """
    row = next((row for row, is_wrong in enumerate(wrong) if is_wrong), None)
    if row is not None:
        found = repr(split.columns[column][row])
        raise DataError(f"{split.origin}: row {row} (from 0), column '{column}': {wanted}, found {found[:60]}")
