"""One global ranking of units by score, cut where enough is gone.

Selection by GRAIN (arXiv 2212.07634, section 3): all units of all kinds and layers in one list, the
lowest scores first, and the shortest prefix that meets the budget is removed. What is removed stays
removed. Extra here: units may be taken in packs, so that what is kept has sizes that hardware likes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Ranking", "UnitGroups"]


@dataclass(frozen=True)
class UnitGroups:
    """Units of one kind: scores, masks and prices, grouped by what is rounded together.

    Attributes:
        score: [groups, units]; higher is kept longer.
        mask: [groups, units] 1 where the unit is kept, 0 where it is gone already.
        price: [groups, units] cost that goes with a unit, all else kept, fp64.
        round_to: units of a group go in packs of so many.
    """

    score: Tensor
    mask: Tensor
    price: Tensor
    round_to: int = 1


@dataclass
class _Packs:
    """Packs of a group's units: best units in the first pack."""

    score: Tensor
    price: Tensor
    of_unit: Tensor


def _packs(group: UnitGroups) -> _Packs:
    score = torch.where(group.mask != 0, group.score.double(), -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    of_unit = rank // group.round_to
    num_packs = -(-score.shape[1] // group.round_to)
    zeros = score.new_zeros(len(score), num_packs)
    # A pack is as good as its members on average. -inf + finite is -inf: a broken pack goes whole.
    count = zeros.scatter_add(1, of_unit, torch.ones_like(score))
    return _Packs(zeros.scatter_add(1, of_unit, score) / count, zeros.scatter_add(1, of_unit, group.price), of_unit)


class Ranking:
    """All packs of some groups in one order, the lowest scores first.

    Args:
        groups: by kind.
        tied: (follower, leader) kinds with the same groups, the follower first among `groups`: where a
            group of the leader loses its last unit, the follower's units are gone, and count (GRAIN:
            queries of a head without values).
    """

    def __init__(self, groups: Mapping[str, UnitGroups], *, tied: tuple[str, str] | None = None) -> None:
        packs = {kind: _packs(group) for kind, group in groups.items()}
        if tied is not None and all(kind in packs for kind in tied):
            follower, leader = (packs[kind] for kind in tied)
            # The leader's best pack is the last to go, and no unit of the follower outlives it. Between equals the
            # follower goes first: once the leader's last unit is gone all of the follower is, and has to be counted.
            follower.score = torch.minimum(follower.score, leader.score.max(dim=1, keepdim=True).values)
        score = torch.cat([pack.score.flatten() for pack in packs.values()])
        price = torch.cat([pack.price.flatten() for pack in packs.values()])
        self._packs = packs
        self._order = score.argsort(stable=True)
        self._gone = price[self._order].cumsum(0)
        self.least = int((score == -torch.inf).sum())
        """How many packs are gone already."""

    def prefix(self, price: float) -> int:
        """How many packs go where units of so large a price are to go, those that are gone already included."""
        before = torch.cat([self._gone.new_zeros(1), self._gone[:-1]])
        return max(self.least, int((before < price).sum()))

    def masks(self, count: int) -> dict[str, Tensor]:
        """Masks without the first packs of the order: by kind, [groups, units] fp32."""
        removed = torch.zeros(len(self._order), dtype=torch.bool)
        removed[self._order[:count]] = True
        sizes = [pack.score.numel() for pack in self._packs.values()]
        parts = torch.split(removed, sizes)  # type: ignore[no-untyped-call]
        return {
            kind: (~part.view(pack.score.shape).gather(1, pack.of_unit)).float()
            for (kind, pack), part in zip(self._packs.items(), parts, strict=True)
        }

    def shortest(self, guess: int, meets: Callable[[dict[str, Tensor]], bool]) -> dict[str, Tensor]:
        """Masks without the shortest prefix that meets a condition, which holds for every longer one too.

        Prices hold while all else is kept. What has gone together may save more or less than their sum, so that the
        prefix that they give is where the search begins.

        Args:
            guess: a prefix to begin with.
            meets: whether masks do.
        """
        most = len(self._order)
        return self.masks(_first(lambda count: meets(self.masks(count)), guess, self.least, most))


def _first(holds: Callable[[int], bool], guess: int, least: int, most: int) -> int:
    """The least number for which something holds that holds for all larger ones; `most` where it does for none.

    It is looked for around the guess, in steps that double, and then by halving.
    """
    lacks, enough, step = least - 1, most, 1
    if holds(guess):
        enough = guess
        while enough > least and holds(nearer := max(least, enough - step)):
            enough, step = nearer, 2 * step
        lacks = max(lacks, enough - step)
    else:
        lacks = guess
        while lacks < most and not holds(further := min(most, lacks + step)):
            lacks, step = further, 2 * step
        enough = min(most, lacks + step)
    while enough - lacks > 1:
        middle = (lacks + enough) // 2
        lacks, enough = (lacks, middle) if holds(middle) else (middle, enough)
    return enough
