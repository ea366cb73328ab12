"""What code that runs on one rank or on many asks of them; and the one that stands for a single process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

__all__ = ["Alone", "Ranks"]

T = TypeVar("T")


class Ranks(Protocol):
    """This process among its peers, as `World` is; none of it needs DeepSpeed."""

    @property
    def rank(self) -> int:
        """Of this process."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def device(self) -> torch.device:
        """That this rank computes on."""

    def gather(self, value: T, doing: str = "gather") -> list[T]:
        """Every rank's value on every rank. Collective: all ranks must call."""


@dataclass(frozen=True)
class Alone:
    """A single process, that no launcher started and that meets nobody."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def gather(self, value: T, doing: str = "gather") -> list[T]:
        """The only value there is."""
        return [value]
