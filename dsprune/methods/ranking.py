"""One global ranking of units by score, cut where enough parameters are gone.

Selection by GRAIN (arXiv 2212.07634, section 3): all units of all kinds and layers in one list, the
lowest scores first, and the shortest prefix that meets the budget is removed. What is removed stays
removed. Extra here: units may be taken in packs, so that what is kept has sizes that hardware likes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UnitGroups", "prune_lowest"]


@dataclass(frozen=True)
class UnitGroups:
    """Units of one kind: scores, masks and prices, grouped by what is rounded together.

    Attributes:
        score: [groups, units]; higher is kept longer.
        mask: [groups, units] 1 where the unit is kept, 0 where it is gone already.
        price: [groups, units] parameters that go with a unit, fp64.
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


def prune_lowest(
    groups: Mapping[str, UnitGroups], budget: float, *, tied: tuple[str, str] | None = None
) -> dict[str, Tensor]:
    """Masks that leave out the lowest-scored packs of units until `budget` parameters are gone.

    Args:
        groups: by kind.
        budget: parameters to remove, those that are gone already included.
        tied: (follower, leader) kinds with the same groups, the follower first among `groups`: where a
            group of the leader loses its last unit, the follower's units are gone, and count (GRAIN:
            queries of a head without values).

    Returns:
        New masks by kind, [groups, units] fp32.
    """
    packs = {kind: _packs(group) for kind, group in groups.items()}
    if tied is not None and all(kind in packs for kind in tied):
        follower, leader = (packs[kind] for kind in tied)
        # The leader's best pack is the last to go, and no unit of the follower outlives it. Between equals the
        # follower goes first: once the leader's last unit is gone all of the follower is, and has to be counted.
        follower.score = torch.minimum(follower.score, leader.score.max(dim=1, keepdim=True).values)
    score = torch.cat([pack.score.flatten() for pack in packs.values()])
    price = torch.cat([pack.price.flatten() for pack in packs.values()])
    order = score.argsort(stable=True)
    gone_before = price[order].cumsum(0) - price[order]
    # Prices are sums of a few thousand whole numbers, so that equality is exact.
    removed = torch.zeros_like(score, dtype=torch.bool)
    removed[order] = (gone_before < budget) | (score[order] == -torch.inf)
    parts = torch.split(removed, [pack.score.numel() for pack in packs.values()])  # type: ignore[no-untyped-call]
    return {
        kind: (~part.view(pack.score.shape).gather(1, pack.of_unit)).float()
        for (kind, pack), part in zip(packs.items(), parts, strict=True)
    }
