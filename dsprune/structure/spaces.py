"""A model's prunable structure: every parameter, the space that each of its axes lives in, and what gates it.

This is what a family spec becomes once it is laid over one model (`analysis.py`). It is pure description:
it holds no tensor, and is the same for a model on the meta device, under ZeRO-3, or on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch

from dsprune.arch import FamilySpec, StackSpec

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
    "Stack",
    "Structure",
    "Sublayer",
    "gate_shapes",
]

Part = Literal["embeddings", "encoder", "head"]
SublayerKind = Literal["attn", "ffn"]
Empty = Literal["identity", "bias"]
"""What a sublayer without units computes: nothing at all (CoFi: the residual, un-normalised), or its
output bias followed by its norm (GRAIN)."""

GATE_KINDS = ("head", "attn", "ffn", "ffn_dim", "hidden", "qk_dim", "vo_dim", "attn_row", "ffn_row", "pooler")
"""All kinds; the last is one of models with a pooler alone."""


@dataclass(frozen=True)
class Sizes:
    """Dense sizes: A attention sublayers of H heads of D dimensions, B FFN sublayers of F neurons, d hidden dimensions.

    A and B are the number of layers, L, unless layers have cross attention as well.

    K groups of query heads share their keys and values; a group lives and dies as one. `pair` is how many
    dimensions make one query unit: 2 where rotary positions turn dimensions by twos. `pooler` is the number of rows of
    the linear that pools a sequence for a classifier; 0 where there is none. `embedding` is the width of the
    embeddings, where a configuration tells it apart from d.
    """

    num_layers: int
    num_attn: int
    num_ffn: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    hidden: int
    num_groups: int
    pair: int = 1
    pooler: int = 0
    embedding: int = 0

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_groups


@dataclass(frozen=True)
class Space:
    """A set of units that live and die together on every axis that names the space.

    `kind` is also the kind of the gate that decides over it, together with the coarser gates over it:
    query/key and value/output dimensions go with their head, output rows with the coordinate of the
    residual stream that they write. `index` is the place of its sublayer among those of its kind, which is the row
    of the gate tensor; None for a space that the whole model shares. Units of heads stand in `groups`, head after
    head.
    """

    kind: str
    index: int | None
    size: int
    groups: int = 1

    @property
    def name(self) -> str:
        return self.kind if self.index is None else f"{self.kind}.{self.index}"


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

    `name` is that of the family's spec. `index` is its place among the sublayers of its kind, `layer` that of its
    layer among those of all stacks. `units` are what the output linear reads: value dimensions or neurons; `rows` is
    what it writes. Attention also has the linear of its queries, whose rows are the units `queries`, and maybe another
    for the queries of a table of positions.
    """

    name: str
    kind: SublayerKind
    index: int
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
    by index and never multiplied. `positions`: rows of the table of positions that it multiplies. `users` share it:
    it goes with the last of them, and until then stands with the first that is left.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    part: Part
    sublayer: Sublayer | None = None
    inner: bool = False
    per_sequence: bool = False
    lookup: bool = False
    users: tuple[Sublayer, ...] = ()
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
class Stack:
    """Where one stack of layers stands in a model, from its root.

    Attributes:
        spec: of the family.
        layers: path of each layer.
        start: place of the first one among the layers of all stacks.
        final_norm: norm after the last layer, in a pre-norm model.
        embedding: module that looks up its words, where that is not the one which owns the word embedding.
    """

    spec: StackSpec
    layers: tuple[str, ...]
    start: int
    final_norm: str | None
    embedding: str | None


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
    stacks: tuple[Stack, ...]
    sublayers: tuple[Sublayer, ...]
    hidden: Space
    pooler: Space | None
    """What a linear pools of each sequence and the classifier reads, if there are such."""
    embedding_norm: str | None
    """Norm over the summed embeddings, where those live in the hidden space."""
    embedding_rank: int | None = None
    """Rank of the factored word embedding; None where it is one table."""
    tied: bool = False
    """Whether an output head multiplies by the word embedding."""
    has_head: bool = True
    """Whether something reads the residual stream in the end; a bare model hands it out."""
    scales_head: bool = False
    """Whether what the head reads is scaled by the hidden size, which has to stay that of the dense model."""
    positions: Positions | None = None

    @property
    def gate_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the gates, by kind."""
        return gate_shapes(self.sizes)

    def refusal(self, kinds: Iterable[str]) -> str | None:
        """Why units of these kinds cannot be lost exactly; None where they can."""
        return self.family.refusal(kinds)

    def unit_of(self, kind: str) -> str:
        """What kind of unit gates of a kind decide over."""
        return kind

    @property
    def final_norms(self) -> tuple[str, ...]:
        """Norms of the residual stream after the last layer of each stack, in a pre-norm model."""
        return tuple(stack.final_norm for stack in self.stacks if stack.final_norm is not None)

    @property
    def factored_away(self) -> int:
        """Parameters that factoring the word embedding saved before pruning began."""
        if self.embedding_rank is None:
            return 0
        path = join(self.base, self.family.word_embeddings)
        table, projection = (self.params[f"{path}.{part}.weight"] for part in ("table", "projection"))
        return table.shape[0] * projection.shape[0] - table.numel - projection.numel

    @property
    def factoring_macs(self) -> int:
        """Multiply-adds of a token that factoring the word embedding has added: those of its projection."""
        if self.embedding_rank is None:
            return 0
        return self.params[f"{join(self.base, self.family.word_embeddings)}.projection.weight"].numel

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Path of each layer of each stack, from the root of the model."""
        return tuple(path for stack in self.stacks for path in stack.layers)

    def stack_of(self, layer: int) -> Stack:
        """The stack that a layer stands in."""
        return next(stack for stack in reversed(self.stacks) if stack.start <= layer)

    @property
    def keeps_width(self) -> bool:
        """Whether a pooler or head has the dense hidden size whatever is cut, which no narrower stock class has."""
        segments = (segment for p in self.params.values() if p.part == "head" for axis in p.axes for segment in axis)
        return any(segment.space is None and segment.extent == self.sizes.hidden for segment in segments)

    @property
    def tables(self) -> tuple[str, ...]:
        """Embeddings that write the residual stream as it is, without a norm between."""
        if not self.final_norms:
            return ()
        readers = tuple(stack.embedding for stack in self.stacks if stack.embedding is not None)
        if readers:
            return readers
        paths = (join(self.base, path) for path in self.family.embeddings)
        return tuple(path for path in paths if f"{path}.weight" in self.params)

    def is_transposed(self, path: str) -> bool:
        """Whether the module at a path from the root stores its weight input axis first."""
        return any(path.endswith(f".{place}") for place in self.family.transposed)

    def linear_axes(self, path: str) -> tuple[Axis, Axis]:
        """Output and input axis of a linear's weight, however it is stored."""
        first, second = self.params[f"{path}.weight"].axes
        return (second, first) if self.is_transposed(path) else (first, second)

    @property
    def is_projected(self) -> bool:
        """Whether embeddings have a width of their own, and a projection to the residual stream."""
        projection = self.family.embedding_projection
        return projection is not None and join(self.base, projection, "weight") in self.params

    @property
    def pooler_readers(self) -> tuple[str, ...]:
        """Linears whose columns the gates of the pooler multiply."""
        gated = (
            p.name
            for p in self.params.values()
            for axis in p.axes
            for segment in axis
            if segment.space is not None and segment.space == self.pooler and segment.gated
        )
        return tuple(name.removesuffix(".weight") for name in gated)

    def sublayers_of(self, kind: SublayerKind) -> tuple[Sublayer, ...]:
        return tuple(sublayer for sublayer in self.sublayers if sublayer.kind == kind)

    def spaces(self) -> Iterator[Space]:
        """All spaces: each sublayer's units, then the hidden space and that of the pooler."""
        for sublayer in self.sublayers:
            if sublayer.queries is not None:
                yield sublayer.queries
            yield sublayer.units
            yield sublayer.rows
        yield self.hidden
        if self.pooler is not None:
            yield self.pooler


def gate_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of the gate tensor of each kind: A attentions, B FFNs, K groups of heads, F neurons, d hidden.

    Gates of the pooler are those of models that have one.
    """
    attn, ffn, width = sizes.num_attn, sizes.num_ffn, sizes.num_groups * sizes.head_dim
    pooler = {"pooler": (sizes.pooler,)} if sizes.pooler else {}
    return {
        "head": (attn, sizes.num_groups),
        "attn": (attn,),
        "ffn": (ffn,),
        "ffn_dim": (ffn, sizes.ffn_dim),
        "hidden": (sizes.hidden,),
        "qk_dim": (attn, width // sizes.pair),
        "vo_dim": (attn, width),
        "attn_row": (attn, sizes.hidden),
        "ffn_row": (ffn, sizes.hidden),
        **pooler,
    }


def join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def param_shape(param: torch.Tensor) -> tuple[int, ...]:
    """Full shape of a parameter, also of one that ZeRO-3 has partitioned away (`ds_shape`)."""
    return tuple(getattr(param, "ds_shape", param.shape))
