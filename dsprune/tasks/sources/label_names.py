"""Labels as files hold them: class names, numbers, booleans, any of these as text; and the names to be found in them.

A value is first looked for among the names. Its number counts only where no name is a number itself: of the star
ratings 1 to 5, 1 is the first label and not the second.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from dsprune.errors import DataError

__all__ = [
    "as_list",
    "as_number",
    "find_names",
    "label_reader",
    "labels_there",
    "listed",
    "name_of",
    "wanted_label",
]

SHOWN = 12
"""Names that a message lists."""
WHOLE = re.compile(r"([+-]?\d+)\.0*")
"""A whole number as a table with gaps writes it: 1.0."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def listed(names: Iterable[Any]) -> str:
    """Some names for a message, and how many more there are."""
    every = [str(name) for name in names]
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


def as_number(value: Any) -> float | None:
    """A finite number, or text that spells one; None for anything else, booleans included."""
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        value = float(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def as_list(cell: Any, separator: str | None) -> Any:
    """A cell that holds several values: a list, one that is written out (`['a', 'b']`), or text between separators.

    Args:
        cell: as it was read.
        separator: between the values of a text; None is any space.

    Returns:
        the values without space around them; the cell itself where it is neither list nor text.
    """
    if not isinstance(cell, str):
        return cell
    if cell.strip().startswith("[") and cell.strip().endswith("]"):
        try:
            return list(ast.literal_eval(cell.strip()))
        except (ValueError, SyntaxError):
            pass  # a text in brackets
    parts = [part.strip() for part in cell.split(separator)]
    return [part for part in parts if part]


def name_of(value: Any) -> str | None:
    """The name of the class that a label stands for, where names are to be found; None for what cannot be a label."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, (int, float)):
        return _plain(repr(value)) if math.isfinite(value) else None
    return (_plain(value.strip()) or None) if isinstance(value, str) else None


def find_names(values: Iterable[Any]) -> tuple[str, ...]:
    """The names of all classes that labels stand for, sorted: numbers by size, words by their letters.

    Args:
        values: labels, each of which has a name.

    Raises:
        DataError: names that only case, spaces, hyphens or underscores tell apart.
    """
    # 1, 1.0 and True are one element of a set, and not one label.
    kinds = {(type(value), value): value for value in values}
    names = {name for value in kinds.values() if (name := name_of(value)) is not None}
    alike: dict[str, str] = {}
    for name in sorted(names):
        other = alike.setdefault(_canonical(name), name)
        if other != name:
            raise DataError(
                f"labels '{other}' and '{name}' differ in case, spaces, hyphens or underscores alone: make them one, "
                "or say that they are two with task.labels"
            )
    numeric = all(as_number(name) is not None for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numeric else 0.0, name)))


def label_reader(names: Sequence[str]) -> Callable[[Any], int | None]:
    """What gives the place of a label among names, or None for what is none of them.

    Names are compared without regard to case, spaces, hyphens and underscores, where these do not tell two apart.
    Where no name is a number, a label may be its place (1, 1.0, "1") or the name that models have by default
    ("LABEL_1"), and of two labels the booleans False and True.

    Args:
        names: of all labels in order.
    """
    exact, loose = _spellings(names)
    found: dict[Hashable, int | None] = {}

    def look_up(value: Any) -> int | None:
        name = name_of(value)
        if name is None:
            return None
        places = (exact.get(str(value)), exact.get(name), loose.get(_canonical(name)))
        return next((place for place in places if place is not None), None)

    def read(value: Any) -> int | None:
        if not isinstance(value, (bool, int, float, str)):
            return None
        key = (type(value), value)
        if key not in found:
            found[key] = look_up(value)
        return found[key]

    return read


def wanted_label(names: Sequence[str]) -> str:
    """What a message asks for where a label is none of these."""
    numbers = f", or a number from 0 to {len(names) - 1}"
    return f"expected one of {listed(names)}" + numbers * (not any(as_number(name) is not None for name in names))


def labels_there(values: Iterable[Any]) -> str:
    """What a message adds on the labels that a column does hold."""
    return f"; the column holds {listed(sorted({str(value) for value in values}))}"


def _spellings(names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The places of labels by exact spelling, and by spelling without what people write differently."""
    exact = {name: place for place, name in enumerate(names)}
    canonical = {_canonical(name): place for place, name in enumerate(names)}
    loose = canonical if len(canonical) == len(names) else {}
    if any(as_number(name) is not None for name in names):
        flags = {"false": exact["0"], "true": exact["1"]} if set(names) == {"0", "1"} else {}
        return exact, flags | loose
    numbers = {str(place): place for place in range(len(names))}
    defaults = {f"label{place}": place for place in range(len(names))}
    flags = {"false": 0, "true": 1} if len(names) == 2 else {}
    return numbers | exact, defaults | flags | loose


def _plain(text: str) -> str:
    whole = WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _canonical(name: str) -> str:
    """A name without what people write differently; of a number, nothing: -1 is not 1."""
    return name if as_number(name) is not None else re.sub(r"[\s_-]+", "", name).casefold()
