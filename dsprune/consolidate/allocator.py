"""Keeping resident memory down to what is alive.

The C library's allocator keeps what is freed when something small still lives above it. A stream of
many tensors, each freed before the next one, then looks as large as the whole model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["give_back"]


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; other C libraries have none, and need none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return all freed memory to the system; a millisecond or so."""
    trim = _trim()
    if trim is not None:
        trim(0)
