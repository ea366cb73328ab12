"""Which sizes of a model are measured: numbers of units by hidden widths, and heads that lost dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dsprune.structure import Empty, Selection, Structure, by_head, ones
from dsprune.structure.latency import parts_of

__all__ = ["Point", "knots", "make_selection", "plan_points"]

HEADS = (1 / 6, 1 / 4, 1 / 2, 3 / 4, 1)
NEURONS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
HIDDEN = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Shares of the dense sizes that are measured; a single unit is as well."""
WIDTHS = (1 / 4, 1 / 2, 3 / 4)
"""Shares of a head's dimensions that are measured."""
NARROW = (1 / 4, 1 / 2)
"""Likewise, where one head keeps all of them and the others are padded to its size."""


@dataclass(frozen=True)
class Point:
    """Some sublayers of one part at one size, and nothing else: or, without a part, what stays.

    Attributes:
        part: name of the part.
        units: heads (or groups), or neurons.
        hidden: width of the residual stream.
        queries, values: dimensions that each head keeps; None: all.
        padded: whether the first head keeps all of them.
        empty: with "bias" and no part: every sublayer without units, its output bias and norm left.
    """

    part: str | None
    units: int
    hidden: int
    queries: int | None = None
    values: int | None = None
    padded: bool = False
    empty: Empty = "identity"

    @property
    def is_ragged(self) -> bool:
        """Whether heads lost dimensions."""
        return self.queries is not None or self.values is not None


def knots(size: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Shares of a dense size as whole numbers, ascending; one is among them."""
    return tuple(sorted({1, size, *(max(1, round(share * size)) for share in shares)}))


def plan_points(structure: Structure, head_multiple: int) -> list[Point]:
    """All points of a model's table."""
    sizes = structure.sizes
    widths = knots(sizes.hidden, HIDDEN) if structure.family.refusal(["hidden"]) is None else (sizes.hidden,)
    points = [Point(None, 0, width, empty=empty) for empty in _empties for width in widths]
    for name, sublayers in parts_of(structure).items():
        is_attention = sublayers[0].kind == "attn"
        units = knots(sizes.num_groups, HEADS) if is_attention else knots(sizes.ffn_dim, NEURONS)
        points += [Point(name, number, width) for number in units for width in widths]
        if is_attention:
            points += _ragged(structure, name, head_multiple)
    return points


_empties: tuple[Empty, ...] = ("identity", "bias")


def _ragged(structure: Structure, part: str, head_multiple: int) -> list[Point]:
    """Attentions whose heads are all narrower, and such as are padded to the size of one that is not."""
    sizes = structure.sizes
    if structure.family.refusal(["qk_dim", "vo_dim"]) is not None or sizes.head_dim < 4:
        return []
    groups, hidden, dims = sizes.num_groups, sizes.hidden, sizes.head_dim

    def width(share: float, multiple: int) -> int:
        return max(multiple, round(share * dims / multiple) * multiple)

    alike = sorted({width(share, head_multiple) for share in WIDTHS} - {dims})
    points = [Point(part, groups, hidden, size, size) for size in alike if size < dims]
    if groups > 1:
        narrow = sorted({width(share, 2) for share in NARROW})
        points += [Point(part, groups, hidden, size, size, padded=True) for size in narrow]
        half = narrow[-1]
        points += [
            Point(part, groups, hidden, half, None, padded=True),
            Point(part, groups, hidden, None, half, padded=True),
        ]
    return points


def make_selection(structure: Structure, point: Point, depth: int) -> Selection:
    """The selection of a point, in so many sublayers of its part."""
    gates = ones(structure)
    gates["hidden"][point.hidden :] = 0
    for kind in ("attn", "ffn"):
        gates[kind].zero_()
    if point.part is not None:
        sublayers = parts_of(structure)[point.part][:depth]
        index, kind = [sublayer.index for sublayer in sublayers], sublayers[0].kind
        gates[kind][index] = 1
        gates["head" if kind == "attn" else "ffn_dim"][:, point.units :] = 0
        for dims, kept in (("qk_dim", point.queries), ("vo_dim", point.values)):
            if kept is not None:
                _narrow(structure, gates[dims], kept // (structure.sizes.pair if dims == "qk_dim" else 1), point.padded)
    return Selection.from_gates(structure, gates, empty=point.empty)


def _narrow(structure: Structure, gate: Tensor, kept: int, padded: bool) -> None:
    """Close all but the first units of each head; those of the first head only where it is not `padded`."""
    heads = by_head(gate, structure.sizes.num_groups)
    heads[:, int(padded) :, kept:] = 0
