"""What a method may know of the thing that it prunes, whether its units are those of a model or blocks of matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

__all__ = ["Choice", "Prunable"]


class Prunable(Protocol):
    """Something that gates decide over; `Structure` and `BlockStructure` are."""

    @property
    def gate_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of the gates, by kind."""

    def refusal(self, kinds: Iterable[str]) -> str | None:
        """Why units of these kinds cannot be lost exactly; None where they can."""

    def unit_of(self, kind: str) -> str:
        """What kind of unit gates of a kind decide over."""


class Choice(Protocol):
    """What a method chose, for good; `Selection` and `BlockSelection` are."""

    @property
    def gates(self) -> Mapping[str, Tensor]:
        """By kind: 0 removes a unit, any other value keeps it."""

    def save(self, path: Path, **metadata: Any) -> None:
        """Write to a safetensors file, for consolidation."""
