"""Examples as they were read, before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dsprune.errors import DataError

__all__ = ["HELD_OUT", "Split", "Splits", "hold_out", "renamed", "with_class_names"]

HELD_OUT = "heldout"
"""Name in figures of training examples that are evaluated on instead: no official split has it."""


@dataclass(frozen=True)
class Split:
    """One split as it was read.

    Attributes:
        name: of the split; for a file that is not the official split, the file's own.
        origin: file or hub address, for messages.
        columns: raw values by column name.
        notes: what figures measured on it have to say.
        whole: it holds all that was read, not just the first examples.
        class_names: of columns whose integers stand for classes, the names of these, where the source tells them.
        renamed: columns that the source calls otherwise, and how.
    """

    name: str
    origin: str
    columns: Mapping[str, Sequence[Any]]
    notes: tuple[str, ...] = ()
    whole: bool = True
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def first(self, count: int | None) -> Split:
        """The first so many examples, with a note that says so; all of them for None."""
        if count is None or count >= len(self):
            return self
        note = f"{self.name}: the first {count} of {len(self)} examples"
        return replace(self.rows(range(count)), notes=(*self.notes, note), whole=False)

    def rows(self, rows: Sequence[int]) -> Split:
        """Some of the examples."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return replace(self, columns=columns)

    def with_columns(self, **columns: Sequence[Any]) -> Split:
        """The split with some columns changed."""
        return replace(self, columns={**self.columns, **columns})


@dataclass(frozen=True)
class Splits:
    """Training and evaluation examples as they were read."""

    train: Split
    evals: Mapping[str, Split]

    def __iter__(self) -> Iterator[Split]:
        yield self.train
        yield from self.evals.values()

    def map(self, change: Callable[[Split], Split]) -> Splits:
        """All splits, changed."""
        return Splits(change(self.train), {name: change(split) for name, split in self.evals.items()})


def hold_out(train: Split, share: float) -> tuple[Split, Split]:
    """Training examples, and those that are held out of them to evaluate on.

    The choice depends on the number of examples alone, not on the run's seed: runs of several seeds are then compared
    on the same examples, and a teacher from another run has not seen them.

    Args:
        train: all training examples.
        share: of them that is held out, at least one example.

    Raises:
        DataError: no example would be left to train on.
    """
    count = max(1, round(share * len(train)))
    if count >= len(train):
        raise DataError(
            f"{train.origin}: data.validation_share = {share} of {len(train)} examples leaves none to train on"
        )
    order = np.random.default_rng(0).permutation(len(train))
    note = f"{HELD_OUT}: {count} of the {len(train)} examples of {train.name}, not trained on"
    held = replace(train.rows(sorted(order[:count].tolist())), name=HELD_OUT, notes=(note,))
    return train.rows(sorted(order[count:].tolist())), held


def renamed(split: Split, columns: Mapping[str, str]) -> Split:
    """The split under the task's names of columns.

    Raises:
        DataError: a column that is not there.
    """
    for role, column in columns.items():
        if column not in split.columns:
            there = ", ".join(split.columns)
            raise DataError(f"{split.origin}: no column '{column}' (data.columns.{role}); there is {there}")
    taken = {*columns, *columns.values()}
    names = {name: name for name in split.columns if name not in taken} | dict(columns)
    return replace(
        split,
        columns={name: split.columns[column] for name, column in names.items()},
        class_names={name: split.class_names[column] for name, column in names.items() if column in split.class_names},
        renamed={role: column for role, column in columns.items() if role != column},
    )


def with_class_names(split: Split, columns: Sequence[str]) -> Split:
    """The split with classes by name where its source tells the names: it may number them in an order of its own."""

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(item, names) for item in value]
        return names[value] if type(value) is int and 0 <= value < len(names) else value

    known = {name: names for name, names in split.class_names.items() if name in columns}
    return split.with_columns(**{name: [named(v, names) for v in split.columns[name]] for name, names in known.items()})
