"""Milliseconds of one sublayer at any sizes, through the points that were measured.

Of heads that lost dimensions two things are true at once, and the lesser is what a model pays: they take no longer
than whole heads, and no longer than the sum of

    what any attention takes + products(queries and values kept, hidden width) + heads * scores(size of the widest),

because heads of unequal size are padded to that of the widest when they run. `products` is what whole heads take at
the same number of dimensions, less their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsprune.structure.latency.curves import Grid, Matrix, monotone, piecewise
from dsprune.structure.latency.table import PartTimes, WidthTime, matrix

__all__ = ["AttentionSizes", "AttentionTime", "SublayerTime"]

SPLIT = (0.25, 0.75)
"""Bounds of what queries and keys take of the products of attention, whatever noise says: the rest is for values."""


@dataclass(frozen=True)
class AttentionSizes:
    """Sizes of attentions: [A] each. A group of heads that share keys and values counts once."""

    heads: Tensor
    queries: Tensor
    """Query dimensions of all heads together."""
    values: Tensor
    widest: Tensor
    """Dimensions that all heads are padded to: the most that one has."""


class SublayerTime:
    """Time of sublayers of one part by whole units.

    Args:
        part: its measured times.
        hidden: measured widths of the residual stream.
    """

    def __init__(self, part: PartTimes, hidden: Sequence[int]) -> None:
        times = monotone(matrix(part))
        self.base = _at_no_unit(part.units, times)
        self.units = np.asarray([0, *part.units], dtype=np.float64)
        self.hidden = np.asarray(hidden, dtype=np.float64)
        self.times = np.concatenate([self.base[None], times])
        self._grid = Grid(self.units, hidden, self.times)

    def of_units(self, units: Tensor, alive: Tensor, width: Tensor) -> Tensor:
        """Milliseconds of sublayers with an expected number of units, there being rows to write: [A].

        Args:
            units: expected number, [A].
            alive: chance that there is any, [A].
            width: of the residual stream, [A].
        """
        return self._grid(units, width) - (1 - alive) * piecewise(self.hidden, self.base, width)


def _at_no_unit(units: Sequence[int], times: Matrix) -> Matrix:
    """What a sublayer takes before its first unit does, by hidden width: on a line through the two smallest.

    It grows with the width no faster than any number of units does, so that a sublayer which may be gone never gets
    cheaper where the width grows.
    """
    first = times[0]
    if len(units) == 1:
        return np.zeros_like(first)
    slope = (times[1] - first) / (units[1] - units[0])
    line = (first - units[0] * slope).clip(0, first)
    rises = np.diff(line).clip(0, np.diff(times, axis=1).min(0))
    raised: Matrix = np.minimum(np.concatenate([line[:1], line[0] + np.cumsum(rises)]), first)
    return raised


class AttentionTime(SublayerTime):
    """Time of attentions by whole heads, and by the dimensions that heads keep.

    Args:
        part: its measured times; without any of heads that lost dimensions, those take as long as whole ones.
        hidden: measured widths of the residual stream.
        head_dim: of the dense head.
    """

    def __init__(self, part: PartTimes, hidden: Sequence[int], head_dim: int) -> None:
        super().__init__(part, hidden)
        self.head_dim = head_dim
        self.is_ragged = bool(part.widths)
        if not self.is_ragged:
            return
        above = self.times - self.base
        scores = self._scores_of_all(part.widths)
        products = monotone(above - scores * (self.units / self.units[-1])[:, None]).clip(min=0)
        self._products = Grid(self.units * head_dim, hidden, products)
        self.split = self._split(part.widths)
        left = ((above - products)[1:] / self.units[1:, None]).max()
        self.widest, self.scores = self._scores_by_size(part.widths, float(left))

    def _scores_of_all(self, points: Sequence[WidthTime]) -> float:
        """What the scores of all heads of the dense size take together.

        Dimensions save products alone while another head keeps its size, whole heads save their scores as well.
        """
        limit = float((self.times[-1] - self.base).min())
        padded = [one for one in points if one.widest == self.head_dim and one.queries == one.values]
        if len(padded) < 2:
            return limit
        kept = [one.queries for one in padded]
        narrow, wide = int(np.argmin(kept)), int(np.argmax(kept))
        heads = [kept[i] / self.head_dim for i in (narrow, wide)]
        whole = np.interp(heads, self.units, self.times[:, -1])
        saved = (whole[1] - whole[0]) - (padded[wide].ms - padded[narrow].ms)
        return float(np.clip(saved * self.units[-1] / (heads[1] - heads[0]), 0, limit))

    def _split(self, points: Sequence[WidthTime]) -> float:
        """Share of the products that queries and keys take."""
        fewer = {
            name: next(
                (one for one in points if one.widest == self.head_dim and getattr(one, name) < getattr(one, other)),
                None,
            )
            for name, other in (("queries", "values"), ("values", "queries"))
        }
        queries, values = fewer["queries"], fewer["values"]
        if queries is None or values is None:
            return 0.5
        removed = queries.values - queries.queries
        kept = torch.tensor([queries.values - removed, queries.values], dtype=torch.float64)
        low, high = self._products(kept, torch.full_like(kept, self.hidden[-1])).tolist()
        slope = high - low
        return float(np.clip(0.5 * (1 - (queries.ms - values.ms) / slope), *SPLIT)) if slope > 0 else 0.5

    def _rest(self, one: WidthTime) -> float:
        """What a measured attention takes beside its products, by head."""
        kept = torch.tensor(self.split * one.queries + (1 - self.split) * one.values, dtype=torch.float64)
        width = torch.tensor(self.hidden[-1])
        return float(one.ms - self.base[-1] - float(self._products(kept, width))) / one.heads

    def _scores_by_size(self, points: Sequence[WidthTime], least: float) -> tuple[Matrix, Matrix]:
        """Sizes of the widest head, and what the scores of one head take there.

        Args:
            points: measured.
            least: for the dense size; whole heads must not come out cheaper by their dimensions than they are.
        """
        by_size: dict[int, list[float]] = {self.head_dim: []}
        for one in points:
            by_size.setdefault(one.widest, []).append(self._rest(one))
        sizes = np.asarray(sorted(by_size), dtype=np.float64)
        times = np.asarray([np.mean(by_size[int(size)] or [least]) for size in sizes])
        times[-1] = max(times[-1], least)
        return sizes, monotone(times.clip(min=0))

    def of_heads(self, sizes: AttentionSizes, alive: Tensor, width: Tensor) -> Tensor:
        """Milliseconds of attentions of expected sizes, there being rows to write: [A].

        Args:
            sizes: expected, [A] each.
            alive: chance that there is a head, [A].
            width: of the residual stream, [A].
        """
        whole = self.of_units(sizes.heads, alive, width)
        if not self.is_ragged:
            return whole
        kept = self.split * sizes.queries + (1 - self.split) * sizes.values
        scores = sizes.heads * piecewise(self.widest, self.scores, sizes.widest)
        return torch.minimum(
            whole, alive * piecewise(self.hidden, self.base, width) + self._products(kept, width) + scores
        )
