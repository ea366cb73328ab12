"""Small files and small words that every room needs: JSON written whole, JSON read, first lines, near misses."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["did_you_mean", "first_line", "read_json", "write_json"]


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it.

    Args:
        path: to write.
        value: JSON value.
        sync: wait until it is on the disk; what is written again in a moment need not be.
    """
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        if sync:
            os.fsync(file.fileno())
    scratch.replace(path)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, or its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(word: str, known: Iterable[str], *, otherwise: str = "", cutoff: float = 0.6, at_most: int = 1) -> str:
    """A question about the known words that are nearest to a mistaken one: `did you mean 'x'?`.

    Args:
        word: that nobody knows.
        known: words that are known.
        otherwise: what to say where none is near.
        cutoff: how alike two words have to be, from 0 to 1.
        at_most: how many to ask about.
    """
    near = difflib.get_close_matches(word, sorted(known), n=at_most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else otherwise
