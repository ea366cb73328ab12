"""A model's prunable structure: every parameter, the space that each of its axes lives in, and what gates it.

This is what a family spec becomes once it is laid over one model. It is pure description: it holds
no tensor, and is the same for a model on the meta device, under ZeRO-3, or on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from dsprune.arch import FamilySpec, SublayerSpec, family_for
from dsprune.errors import ArchitectureError

__all__ = [
    "GATE_KINDS",
    "Empty",
    "ParamSpec",
    "Part",
    "Sizes",
    "Space",
    "Structure",
    "Sublayer",
    "analyze",
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
    """Dense sizes: L layers, H heads of D dimensions, F FFN neurons, d hidden dimensions."""

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    hidden: int


@dataclass(frozen=True)
class Space:
    """A set of units that live and die together on every axis that names the space.

    `kind` is also the kind of the gate that decides over it, together with the coarser gates over it:
    query/key and value/output dimensions go with their head, output rows with the coordinate of the
    residual stream that they write. `layer` is None for a space that the whole model shares.
    """

    kind: str
    layer: int | None
    size: int

    @property
    def name(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"


@dataclass(frozen=True)
class Sublayer:
    """One attention or FFN sublayer: paths from the root of the model, and the spaces of its units.

    `units` are what the output linear reads: value dimensions or neurons; `rows` is what it writes.
    Attention also has the linear of its queries, whose rows are the units `queries`.
    """

    kind: SublayerKind
    layer: int
    units: Space
    rows: Space
    output: str
    norm: str
    query: str | None = None
    queries: Space | None = None


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its dense shape, the space of each axis (None: never cut), and what gates it.

    `gated` marks the axes that the forward pass multiplies by the gates of their space; those are
    the axes that soft gates are folded into at export. The rest are only sliced.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[Space | None, ...]
    part: Part
    sublayer: Sublayer | None = None
    gated: tuple[bool, ...] = ()
    per_sequence: bool = False
    lookup: bool = False

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


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

    @property
    def factored_away(self) -> int:
        """Parameters that factoring the word embedding saved before pruning began."""
        if self.embedding_rank is None:
            return 0
        path = _join(self.base, self.family.word_embeddings)
        table, projection = (self.params[f"{path}.{part}.weight"] for part in ("table", "projection"))
        return table.shape[0] * projection.shape[0] - table.numel - projection.numel

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Path of each encoder layer, from the root of the model."""
        return tuple(_join(self.base, self.family.layers, str(i)) for i in range(self.sizes.num_layers))

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
    """Shape of the gate tensor of each kind (design: L layers, H heads, F neurons, d hidden)."""
    layers = sizes.num_layers
    return {
        "head": (layers, sizes.num_heads),
        "attn": (layers,),
        "ffn": (layers,),
        "ffn_dim": (layers, sizes.ffn_dim),
        "hidden": (sizes.hidden,),
        "qk_dim": (layers, sizes.num_heads * sizes.head_dim),
        "vo_dim": (layers, sizes.num_heads * sizes.head_dim),
        "attn_row": (layers, sizes.hidden),
        "ffn_row": (layers, sizes.hidden),
    }


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def param_shape(param: torch.Tensor) -> tuple[int, ...]:
    """Full shape of a parameter, also of one that ZeRO-3 has partitioned away (`ds_shape`)."""
    return tuple(getattr(param, "ds_shape", param.shape))


def _read_sizes(family: FamilySpec, config: object) -> Sizes:
    try:
        size = {ours: int(getattr(config, theirs)) for ours, theirs in family.sizes.items()}
    except AttributeError as error:
        raise ArchitectureError(f"family '{family.name}': the model's configuration lacks a size: {error}") from error
    return Sizes(head_dim=size["hidden"] // size["num_heads"], **size)


class _Analysis:
    """Walks a family spec over the parameters of one model; used once, by `analyze`."""

    def __init__(self, family: FamilySpec, shapes: Mapping[str, tuple[int, ...]], class_name: str, config: object):
        self.family = family
        self.shapes = dict(shapes)
        self.class_name = class_name
        self.sizes = _read_sizes(family, config)
        self.base = family.base if any(name.startswith(f"{family.base}.") for name in shapes) else ""
        self.hidden = Space("hidden", None, self.sizes.hidden)
        projection = family.embedding_projection
        self.projected = projection is not None and _join(self.base, projection, "weight") in self.shapes
        self.table = _join(self.base, family.word_embeddings, "table")
        self.factored = f"{self.table}.weight" in self.shapes
        self.params: dict[str, ParamSpec] = {}
        self.mistakes: list[str] = []

    def run(self) -> Structure:
        self._walk_embeddings()
        sublayers = [self._walk_sublayer(kind, i) for i in range(self.sizes.num_layers) for kind in ("attn", "ffn")]
        self._walk_heads()
        self._check()
        return Structure(
            family=self.family,
            base=self.base,
            sizes=self.sizes,
            params=self.params,
            sublayers=tuple(sublayers),
            hidden=self.hidden,
            embedding_norm=None if self.projected else self._embedding_norm(),
            embedding_rank=self.shapes[f"{self.table}.weight"][1] if self.factored else None,
        )

    def _embedding_norm(self) -> str | None:
        norms = [path for path, axes in self.family.embeddings.items() if len(axes) == 1]
        return _join(self.base, norms[0]) if norms else None

    def _space(self, axis: str, units: Mapping[str, Space]) -> Space | None:
        if axis == "hidden" or (axis == "embedding" and not self.projected):
            return self.hidden
        if axis in ("-", "embedding"):
            return None
        if axis not in units:
            raise ArchitectureError(f"family '{self.family.name}': axis '{axis}' means nothing here")
        return units[axis]

    def _add(
        self,
        module: str,
        axes: tuple[str, ...],
        part: Part,
        *,
        sublayer: Sublayer | None = None,
        units: Mapping[str, Space] = MappingProxyType({}),
        gated: tuple[bool, ...] = (),
        per_sequence: bool = False,
        lookup: bool = False,
    ) -> None:
        """Claim a module's weight and, if it has one, its bias, which follows the first axis."""
        gated = gated or (False,) * len(axes)
        spaces = tuple(self._space(axis, units) for axis in axes)
        for leaf, width in (("weight", len(axes)), ("bias", 1)):
            name = f"{module}.{leaf}"
            shape = self.shapes.get(name)
            if shape is None:
                continue
            spec = ParamSpec(name, shape, spaces[:width], part, sublayer, gated[:width], per_sequence, lookup)
            if not self._fits(spec):
                continue
            self.params[name] = spec

    def _fits(self, spec: ParamSpec) -> bool:
        ok = len(spec.shape) == len(spec.axes) and all(
            space is None or extent == space.size for extent, space in zip(spec.shape, spec.axes, strict=True)
        )
        if not ok:
            spaces = [space.name if space else "-" for space in spec.axes]
            self.mistakes.append(f"{spec.name} has shape {list(spec.shape)}, which does not fit axes {spaces}")
        return ok

    def _walk_embeddings(self) -> None:
        for path, axes in self.family.embeddings.items():
            if path == self.family.word_embeddings and self.factored:
                self._add_factored(_join(self.base, path), axes[1])
                continue
            lookup = len(axes) == 2 and axes[0] == "-"
            # What writes the residual stream is gated where it writes: a table's columns, a norm, or
            # the rows of the projection.
            gated = tuple(
                axis in ("hidden", "embedding") and not (len(axes) == 2 and i == 1 and not lookup)
                for i, axis in enumerate(axes)
            )
            if self.projected:
                gated = tuple(axis == "hidden" for axis in axes)
            self._add(_join(self.base, path), axes, "embeddings", gated=gated, lookup=lookup)

    def _add_factored(self, path: str, axis: str) -> None:
        """A word embedding as the product of a narrow table and a projection, which writes what the table wrote."""
        self._add(f"{path}.table", ("-", "-"), "embeddings", lookup=True)
        self._add(f"{path}.projection", (axis, "-"), "embeddings", gated=(not self.projected, False))

    def _walk_sublayer(self, kind: Literal["attn", "ffn"], layer: int) -> Sublayer:
        root = _join(self.base, self.family.layers, str(layer))
        spec: SublayerSpec = self.family.attention if kind == "attn" else self.family.ffn
        output, norm = _join(root, spec.output), _join(root, spec.norm)
        rows = Space(f"{kind}_row", layer, self.sizes.hidden)
        if kind == "attn":
            width = self.sizes.num_heads * self.sizes.head_dim
            units = {axis: Space(axis, layer, width) for axis in ("qk_dim", "vo_dim")}
            query = _join(root, spec.query)
            sublayer = Sublayer(kind, layer, units["vo_dim"], rows, output, norm, query, units["qk_dim"])
        else:
            units = {"ffn_dim": Space("ffn_dim", layer, self.sizes.ffn_dim)}
            sublayer = Sublayer(kind, layer, units["ffn_dim"], rows, output, norm)
        for path, axes in self.family.layer.items():
            if path != spec.norm and not units.keys() & set(axes):
                continue
            writes = path in (spec.output, spec.norm)
            if path == spec.output:
                axes, units = (rows.kind, axes[1]), {**units, rows.kind: rows}
            # Queries are gated where they are made, and need no gate on their keys as well.
            gated = (path == spec.query, False) if not writes else (True,) * len(axes)
            self._add(_join(root, path), axes, "encoder", sublayer=sublayer, units=units, gated=gated[: len(axes)])
        return sublayer

    def _walk_heads(self) -> None:
        for path, axes in self.family.pooler.items():
            self._add(_join(self.base, path), axes, "head", per_sequence=True)
        for kind, table in self.family.heads.items():
            if self.base and self.class_name.endswith(kind):
                for path, axes in table.items():
                    self._add(path, axes, "head", per_sequence=kind == "ForSequenceClassification")

    def _check(self) -> None:
        unmatched = sorted(set(self.shapes) - set(self.params) - {m.split(" ", 1)[0] for m in self.mistakes})
        if unmatched:
            shown = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
            self.mistakes.append(f"no place in the spec for {shown}")
        for kind in ("attn", "ffn"):
            spec = self.family.attention if kind == "attn" else self.family.ffn
            root = _join(self.base, self.family.layers, "0")
            for part in filter(None, (spec.output, spec.norm, spec.query)):
                if f"{_join(root, part)}.weight" not in self.params:
                    self.mistakes.append(f"{_join(root, part)}.weight is missing")
        if self.mistakes:
            raise ArchitectureError(
                f"{self.class_name} does not match family '{self.family.name}': " + "; ".join(self.mistakes)
            )


def analyze(model: nn.Module, family: FamilySpec | None = None) -> Structure:
    """Lay a family spec over a dense `transformers` model and account for every parameter.

    Args:
        model: a model on any device, the meta device and ZeRO-3 partitions included.
        family: the spec; by default the one of `model.config.model_type`.

    Raises:
        ArchitectureError: unknown family, or a parameter that the spec does not account for.
    """
    config = model.config
    shapes = {name: param_shape(param) for name, param in model.named_parameters()}
    family = family or family_for(str(getattr(config, "model_type", "")))
    return _Analysis(family, shapes, type(model).__name__, config).run()
