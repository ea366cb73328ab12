"""Which sizes of a model are measured: numbers of units by hidden widths, and heads that lost dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsprune.structure import Empty, Selection, Structure, by_head, ones
from dsprune.structure.latency import parts_of

__all__ = ["Point", "knots", "make_selection", "plan_points"]

HEADS = (1 / 6, 1 / 4, 1 / 2, 3 / 4, 1)
NEURONS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
HIDDEN = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
"""Shares of the dense sizes that are measured; a single unit is as well."""
WIDEST = (1 / 4, 1 / 2, 3 / 4)
"""Shares of a head's dimensions that one head keeps, and the others half of these."""
NARROW = (1 / 4, 1 / 2)
"""Shares that the others keep where one head keeps all."""


@dataclass(frozen=True)
class Point:
    """Some sublayers of one part at one size, and nothing else: or, without a part, what stays.

    Attributes:
        part: name of the part.
        units: heads (or groups), or neurons.
        hidden: width of the residual stream.
        queries, values: dimensions that each head keeps; None: all.
        widest: dimensions that the first head keeps of both, whatever the others do; None: as many as they.
        empty: with "bias" and no part: every sublayer without units, its output bias and norm left.
    """

    part: str | None
    units: int
    hidden: int
    queries: int | None = None
    values: int | None = None
    widest: int | None = None
    empty: Empty = "identity"

    @property
    def is_ragged(self) -> bool:
        """Whether heads lost dimensions."""
        return self.queries is not None or self.values is not None


def knots(size: int, shares: Sequence[float], *, odd: bool = True) -> tuple[int, ...]:
    """Shares of a dense size as whole numbers, ascending; one is among them.

    Args:
        size: dense.
        shares: of it.
        odd: those below the dense size are odd, because pruned sizes mostly are no multiple of anything: products of
            matrices of even sides are faster, and a table of those alone would be too optimistic.
    """
    inner = {round(share * size) for share in shares if share < 1}
    inner = {number - number % 2 + 1 for number in inner} if odd else inner
    return tuple(sorted({1, size, *(number for number in inner if 1 < number < size)}))


def plan_points(structure: Structure, head_multiple: int) -> list[Point]:
    """All points of a model's table."""
    sizes = structure.sizes
    widths = knots(sizes.hidden, HIDDEN) if structure.family.refusal(["hidden"]) is None else (sizes.hidden,)
    points = [Point(None, 0, width, empty=empty) for empty in _empties for width in widths]
    for name, sublayers in parts_of(structure).items():
        is_attention = sublayers[0].kind == "attn"
        units = knots(sizes.num_groups, HEADS, odd=False) if is_attention else knots(sizes.ffn_dim, NEURONS)
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
    padded = sorted({max(head_multiple, round(share * dims / head_multiple) * head_multiple) for share in WIDEST})
    padded = [size for size in padded if size < dims]
    if groups == 1:
        return [Point(part, 1, hidden, size - sizes.pair, size - sizes.pair) for size in padded]
    points = [Point(part, groups, hidden, _half(size), _half(size), widest=size) for size in padded]
    narrow = [_half(2 * share * dims) for share in NARROW]
    points += [Point(part, groups, hidden, size, size, widest=dims) for size in sorted(set(narrow))]
    return [
        *points,
        Point(part, groups, hidden, narrow[-1], None, widest=dims),
        Point(part, groups, hidden, None, narrow[-1], widest=dims),
    ]


def _half(size: float) -> int:
    """About half of a size, even but no multiple of four: rotary dimensions go in pairs."""
    return max(2, 4 * int(size / 8) + 2)


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
        for dims, pair, kept in (("qk_dim", structure.sizes.pair, point.queries), ("vo_dim", 1, point.values)):
            if kept is not None:
                heads = by_head(gates[dims], structure.sizes.num_groups)
                heads[:, 1:, kept // pair :] = 0
                heads[:, :1, (point.widest or kept) // pair :] = 0
    return Selection.from_gates(structure, gates, empty=point.empty)
