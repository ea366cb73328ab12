"""A model's prunable structure: every parameter, the space that each of its axes lives in, and what gates it.

This is what a family spec becomes once it is laid over one model (`analysis.py`). It is pure description:
it holds no tensor, and is the same for a model on the meta device, under ZeRO-3, or on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from dsprune.arch import FamilySpec

__all__ = [
    "GATE_KINDS",
    "Axis",
    "Empty",
    "ParamSpec",
    "Part",
    "Positions",
    "Segment",
    "Sizes",
    "Space",
    "Structure",
    "Sublayer",
    "gate_shapes",
]

Part = Literal["embeddings", "encoder", "head"]
SublayerKind = Literal["attn", "ffn"]
Empty = Literal["identity", "bias"]
"""What a sublayer without units computes: nothing at all (CoFi: the residual, un-normalised), or its
output bias followed by its norm (GRAIN)."""

GATE_KINDS = ("head", "attn", "ffn", "ffn_dim", "hidden", "qk_dim", "vo_dim", "attn_row", "ffn_row")


@dataclass(frozen=True)
class Sizes:
    """Dense sizes: L layers, H heads of D dimensions, F FFN neurons, d hidden dimensions.

    K groups of query heads share their keys and values; a group lives and dies as one. `pair` is how many
    dimensions make one query unit: 2 where rotary positions turn dimensions by twos.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    hidden: int
    num_groups: int
    pair: int = 1

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups


@dataclass(frozen=True)
class Space:
    """A set of units that live and die together on every axis that names the space.

    `kind` is also the kind of the gate that decides over it, together with the coarser gates over it:
    query/key and value/output dimensions go with their head, output rows with the coordinate of the
    residual stream that they write. `layer` is None for a space that the whole model shares. Units of heads
    stand in `groups`, head after head.
    """

    kind: str
    layer: int | None
    size: int
    groups: int = 1

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@dataclass(frozen=True)
class Segment:
    """A run of an axis, whose entries belong to the units of one space (None: to none, never cut).

    A unit may own several entries: a key dimension stands in the keys once and in the queries once for every
    head of its group, a rotary pair is two dimensions. They are laid out as [groups, copies, units of a group].
    `gated` marks what the forward pass multiplies by the gates of the space; soft gates are folded in there at
    export, and the rest is only sliced.
    """

    space: Space | None
    extent: int
    gated: bool = False

    @property
    def copies(self) -> int:
        """Entries of each unit."""
        return 1 if self.space is None else self.extent // self.space.size

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """A value for each entry, [extent], from one for each unit, [size]; differentiable."""
        assert self.space is not None
        if self.copies == 1:
            return values
        return values.view(self.space.groups, 1, -1).expand(-1, self.copies, -1).reshape(-1)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over each unit's entries, [size], of one value for each entry, [extent]."""
        assert self.space is not None
        return values.view(self.space.groups, self.copies, -1).sum(1).reshape(-1)


Axis = tuple[Segment, ...]
"""An axis of a parameter; more than one segment where several linears share a weight."""


@dataclass(frozen=True)
class Sublayer:
    """One attention or FFN sublayer: paths from the root of the model, and the spaces of its units.

    `units` are what the output linear reads: value dimensions or neurons; `rows` is what it writes.
    Attention also has the linear of its queries, whose rows are the units `queries`, and maybe another for
    the queries of a table of positions.
    """

    kind: SublayerKind
    layer: int
    units: Space
    rows: Space
    output: str
    norm: str
    query: str | None = None
    queries: Space | None = None
    position_query: str | None = None


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its dense shape, what each axis is made of, and when it is there at all.

    `inner`: of no use to a sublayer without units, even where such a one keeps its output bias. `lookup`: read
    by index and never multiplied. `positions`: rows of the table of positions that it multiplies.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    part: Part
    sublayer: Sublayer | None = None
    inner: bool = False
    per_sequence: bool = False
    lookup: bool = False
    positions: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tiles(self) -> Iterator[tuple[int, tuple[Space, ...]]]:
        """Rectangles whose entries belong to the same spaces: how many entries, and which spaces."""
        for segments in product(*self.axes):
            spaces = tuple(segment.space for segment in segments if segment.space is not None)
            yield math.prod(segment.extent for segment in segments), spaces


@dataclass(frozen=True)
class Positions:
    """The table of relative positions of one model, which the attention of every layer reads.

    Attributes:
        rows: of the table.
        products: of queries or keys with the table that every score holds.
        norm: of the table.
        readers: where there is no norm, the module of each layer that hands the table to attention.
    """

    rows: int
    products: int
    norm: str | None
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """The prunable structure of one model. Built by `analyze`."""

    family: FamilySpec
    base: str
    sizes: Sizes
    params: Mapping[str, ParamSpec]
    sublayers: tuple[Sublayer, ...]
    hidden: Space
    embedding_norm: str | None
    """Norm over the summed embeddings, where those live in the hidden space."""
    embedding_rank: int | None = None
    """Rank of the factored word embedding; None where it is one table."""
    final_norm: str | None = None
    """Norm of the residual stream after the last layer, in a pre-norm model."""
    tied: bool = False
    """Whether an output head multiplies by the word embedding."""
    positions: Positions | None = None

    @property
    def factored_away(self) -> int:
        """Parameters that factoring the word embedding saved before pruning began."""
        if self.embedding_rank is None:
            return 0
        path = join(self.base, self.family.word_embeddings)
        table, projection = (self.params[f"{path}.{part}.weight"] for part in ("table", "projection"))
        return table.shape[0] * projection.shape[0] - table.numel - projection.numel

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Path of each encoder layer, from the root of the model."""
        return tuple(join(self.base, self.family.layers, str(i)) for i in range(self.sizes.num_layers))

    @property
    def keeps_width(self) -> bool:
        """Whether a pooler or head has the dense hidden size whatever is cut, which no narrower stock class has."""
        segments = (segment for p in self.params.values() if p.part == "head" for axis in p.axes for segment in axis)
        return any(segment.space is None and segment.extent == self.sizes.hidden for segment in segments)

    @property
    def tables(self) -> tuple[str, ...]:
        """Embeddings that write the residual stream as it is, without a norm between."""
        if self.final_norm is None:
            return ()
        paths = (join(self.base, path) for path in self.family.embeddings)
        return tuple(path for path in paths if f"{path}.weight" in self.params)

    def is_transposed(self, path: str) -> bool:
        """Whether the module at a path from the root stores its weight input axis first."""
        return any(path.endswith(f".{place}") for place in self.family.transposed)

    def linear_axes(self, path: str) -> tuple[Axis, Axis]:
        """Output and input axis of a linear's weight, however it is stored."""
        first, second = self.params[f"{path}.weight"].axes
        return (second, first) if self.is_transposed(path) else (first, second)

    def sublayers_of(self, kind: SublayerKind) -> tuple[Sublayer, ...]:
        return tuple(sublayer for sublayer in self.sublayers if sublayer.kind == kind)

    def spaces(self) -> Iterator[Space]:
        """All spaces: each layer's units, then the hidden space."""
        for sublayer in self.sublayers:
            if sublayer.queries is not None:
                yield sublayer.queries
            yield sublayer.units
            yield sublayer.rows
        yield self.hidden


def gate_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of the gate tensor of each kind (design: L layers, K groups of heads, F neurons, d hidden)."""
    layers, width = sizes.num_layers, sizes.num_groups * sizes.head_dim
    return {
        "head": (layers, sizes.num_groups),
        "attn": (layers,),
        "ffn": (layers,),
        "ffn_dim": (layers, sizes.ffn_dim),
        "hidden": (sizes.hidden,),
        "qk_dim": (layers, width // sizes.pair),
        "vo_dim": (layers, width),
        "attn_row": (layers, sizes.hidden),
        "ffn_row": (layers, sizes.hidden),
    }


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def param_shape(param: torch.Tensor) -> tuple[int, ...]:
    """Full shape of a parameter, also of one that ZeRO-3 has partitioned away (`ds_shape`)."""
    return tuple(getattr(param, "ds_shape", param.shape))
