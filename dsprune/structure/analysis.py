"""Laying a family spec over one model: every parameter gets its place, or the model is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import nn

from dsprune.arch import FamilySpec, StackSpec, SublayerSpec, family_for
from dsprune.errors import ArchitectureError
from dsprune.structure.spaces import (
    Axis,
    ParamSpec,
    Part,
    Positions,
    Segment,
    Sizes,
    Space,
    Stack,
    Structure,
    Sublayer,
    gate_shapes,
    join,
    param_shape,
)

__all__ = ["analyze"]


def _read_sizes(family: FamilySpec, stacks: tuple[StackSpec, ...], config: object) -> tuple[Sizes, tuple[int, ...]]:
    """The dense sizes, and the number of layers of each stack."""
    size: dict[str, int] = {}
    for ours, theirs in family.sizes.items():
        value = getattr(config, theirs, None)
        if value is not None:
            size[ours] = int(value)
    for name, formula in family.defaults.items():
        size.setdefault(name, math.prod(int(f) if f.isdigit() else size[f] for f in formula.split(" * ")))
    needed = (*(stack.count for stack in stacks), "num_heads", "hidden", "ffn_dim")
    missing = [f"'{family.sizes[name]}'" for name in needed if name not in size]
    if missing:
        raise ArchitectureError(
            f"family '{family.name}': the model's configuration lacks a size: it has no {', '.join(missing)}"
        )
    size.setdefault("head_dim", size["hidden"] // size["num_heads"])
    size.setdefault("num_groups", size["num_heads"])
    layers = tuple(size[stack.count] for stack in stacks)
    kinds = [sub.kind for stack, count in zip(stacks, layers, strict=True) for sub in stack.sublayers * count]
    counted = {"num_layers": sum(layers), **{f"num_{kind}": kinds.count(kind) for kind in ("attn", "ffn")}}
    for stack in family.stacks:
        size.pop(stack.count, None)
    return Sizes(pair=2 if family.rotary else 1, **counted, **size), layers


def _check_config(family: FamilySpec, config: object) -> None:
    """See that the configuration asks for nothing that the family's spec does not tell.

    Raises:
        ArchitectureError: it does.
    """
    for name, value in family.requires.items():
        if getattr(config, name, value) != value:
            raise ArchitectureError(f"family '{family.name}': {name} = {getattr(config, name)} is not supported")
    kinds = sorted(set(getattr(config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise ArchitectureError(f"layers of several types ({', '.join(kinds)}) in one model are not supported")


class _Placement:
    """Where the parts of one model are, read off the names and shapes of its parameters.

    Args:
        family: its spec.
        shapes: of all parameters, by name.
        class_name: of the model: it tells the head.
        config: of the model.
    """

    def __init__(
        self, family: FamilySpec, shapes: Mapping[str, tuple[int, ...]], class_name: str, config: object
    ) -> None:
        _check_config(family, config)
        self.family = family
        self.config = config
        self.shapes = dict(shapes)
        self.class_name = class_name
        self.base = family.base if any(name.startswith(f"{family.base}.") for name in shapes) else ""
        stacks = tuple(stack for stack in family.stacks if self._is_there(join(self.base, stack.layers)))
        sizes, counts = _read_sizes(family, stacks or family.stacks, config)
        self.sizes = replace(sizes, pooler=(sizes.pooler or sizes.hidden) if self._has_pooler() else 0)
        self.stacks = self._place_stacks(stacks or family.stacks, counts)
        projection = family.embedding_projection
        self.projected = projection is not None and join(self.base, projection, "weight") in self.shapes
        self.table = join(self.base, family.word_embeddings, "table")
        self.factored = f"{self.table}.weight" in self.shapes
        self.positions = self._find_positions()
        self.tied = self._is_tied()

    @property
    def embedding_rank(self) -> int | None:
        """Width of a factored word embedding."""
        return self.shapes[f"{self.table}.weight"][1] if self.factored else None

    @property
    def scales_head(self) -> bool:
        """Whether a head that is the word embedding is scaled."""
        name = self.family.scaled_head
        return name is not None and bool(getattr(self.config, name, True)) and bool(self.heads)

    @property
    def heads(self) -> Mapping[str, tuple[str, ...]]:
        """The modules beside the base, by path: their axes."""
        tables = (table for kind, table in self.family.heads.items() if self.class_name.endswith(kind))
        return next(tables, {}) if self.base or not self.family.base else {}

    @property
    def embedding_norm(self) -> str | None:
        """The first norm whose axis lives in the hidden space."""
        wide = (("hidden",),) if self.projected else (("hidden",), ("embedding",))
        norms = [path for path, axes in self.family.embeddings.items() if axes in wide]
        return join(self.base, norms[0]) if norms else None

    def _is_there(self, path: str) -> bool:
        return any(name.startswith(f"{path}.") for name in self.shapes)

    def _has_pooler(self) -> bool:
        """Whether a head reads what a linear pools of each sequence; that of a bare model is given out as it is."""
        return any("pooler" in axes[1:] for axes in self.heads.values())

    def _is_tied(self) -> bool:
        """Whether the head is the word embedding: it has no weight of its own, and the configuration says so."""
        may_tie = bool(getattr(self.config, "tie_word_embeddings", False))
        return may_tie and any(f"{path}.weight" not in self.shapes for path in self.heads)

    def _place_stacks(self, stacks: tuple[StackSpec, ...], counts: tuple[int, ...]) -> tuple[Stack, ...]:
        placed, start = [], 0
        for stack, count in zip(stacks, counts, strict=True):
            layers = tuple(join(self.base, stack.layers, str(i)) for i in range(count))
            norm, words = (path and join(self.base, path) for path in (stack.final_norm, stack.embedding))
            placed.append(Stack(stack, layers, start, norm, words))
            start += count
        return tuple(placed)

    def _find_positions(self) -> Positions | None:
        spec = self.family.positions
        table = self.shapes.get(join(self.base, spec.table, "weight")) if spec is not None else None
        if spec is None or table is None:
            return None
        norm = join(self.base, spec.norm)
        normed = f"{norm}.weight" in self.shapes
        layers = (path for stack in self.stacks for path in stack.layers)
        readers = () if normed else tuple(join(layer, spec.reader) for layer in layers)
        return Positions(table[0], spec.count_products(self.config), norm if normed else None, readers)

    def table_use(self, path: str, axes: tuple[str, ...]) -> dict[str, Any]:
        """Whether a linear of a layer multiplies the table of positions, and whether it multiplies tokens."""
        spec = self.family.positions
        if spec is None or self.positions is None or axes[0] != "qk_dim":
            return {}
        if path in (spec.query, spec.key):
            return {"positions": self.positions.rows, "per_sequence": True}
        return {"positions": self.positions.rows} if getattr(self.config, spec.shared, False) else {}

    def position_query(self, root: str) -> str | None:
        """Linear of the layer at `root` that makes queries of the table of positions and of nothing else."""
        path = join(root, self.family.positions.query) if self.family.positions else ""
        return path if f"{path}.weight" in self.shapes else None


class _Analysis:
    """Walks a family spec over the parameters of one model; used once, by `analyze`."""

    def __init__(self, place: _Placement) -> None:
        self.place = place
        self.family = place.family
        self.shapes = place.shapes
        self.sizes = place.sizes
        self.stacks = place.stacks
        self.base = place.base
        self.hidden = Space("hidden", None, self.sizes.hidden)
        self.pooler = Space("pooler", None, self.sizes.pooler) if self.sizes.pooler else None
        self.params: dict[str, ParamSpec] = {}
        self.mistakes: list[str] = []

    def run(self) -> Structure:
        place = self.place
        self._walk_embeddings()
        sublayers = self._walk_stacks()
        self._walk_biases(sublayers)
        self._walk_heads()
        self._check()
        return Structure(
            family=self.family,
            base=self.base,
            sizes=self.sizes,
            params=self.params,
            stacks=self.stacks,
            sublayers=tuple(sublayers),
            hidden=self.hidden,
            pooler=self.pooler,
            embedding_norm=place.embedding_norm,
            embedding_rank=place.embedding_rank,
            tied=place.tied,
            has_head=bool(place.heads),
            scales_head=place.scales_head,
            positions=place.positions,
        )

    def _segments(self, axis: str, extent: int, units: Mapping[str, tuple[Space, int]], gated: bool) -> Axis:
        """What an axis is made of; of a shared axis the first part is gated. Extents are those that the spec says."""
        if axis == "hidden" or (axis == "embedding" and not self.place.projected):
            return (Segment(self.hidden, self.hidden.size, gated),)
        if axis == "pooler" and self.pooler is not None:
            return (Segment(self.pooler, self.pooler.size, gated),)
        if axis in ("-", "embedding", "pooler"):
            return (Segment(None, extent),)
        segments = []
        for i, kind in enumerate(axis.split(" + ")):
            if kind not in units:
                raise ArchitectureError(f"family '{self.family.name}': axis '{axis}' means nothing here")
            space, copies = units[kind]
            segments.append(Segment(space, space.size * copies, gated and i == 0))
        return tuple(segments)

    def _add(
        self,
        module: str,
        axes: tuple[str, ...],
        part: Part,
        *,
        sublayer: Sublayer | None = None,
        units: Mapping[str, tuple[Space, int]] = MappingProxyType({}),
        gated: tuple[bool, ...] = (),
        transposed: bool = False,
        **facts: Any,
    ) -> None:
        """Claim a module's weight and, if it has one, its bias, which follows the first axis.

        `units` are spaces by the name of the axis, each with the number of entries that a unit has there.
        """
        gated = gated or (False,) * len(axes)
        for leaf, width in (("weight", len(axes)), ("bias", 1)):
            name = f"{module}.{leaf}"
            shape = self.shapes.get(name)
            if shape is None:
                continue
            if len(shape) != width:
                self.mistakes.append(f"{name} has shape {list(shape)}, which does not fit axes {list(axes[:width])}")
                continue
            order = slice(None, None, -1 if transposed and leaf == "weight" else 1)
            stored = zip(axes[:width][order], shape, gated[:width][order], strict=True)
            parts = tuple(self._segments(axis, extent, units, on) for axis, extent, on in stored)
            spec = ParamSpec(name, shape, parts, part, sublayer, **facts)
            if self._fits(spec):
                self.params[name] = spec

    def _fits(self, spec: ParamSpec) -> bool:
        expected = tuple(sum(segment.extent for segment in axis) for axis in spec.axes)
        if spec.shape != expected:
            spaces = [
                " + ".join(segment.space.name if segment.space else "-" for segment in axis) for axis in spec.axes
            ]
            self.mistakes.append(
                f"{spec.name} has shape {list(spec.shape)}, which does not fit axes {spaces} of {list(expected)}"
            )
        return spec.shape == expected

    def _walk_embeddings(self) -> None:
        for path, axes in self.family.embeddings.items():
            if path == self.family.word_embeddings and self.place.factored:
                self._add_factored(join(self.base, path), axes[1])
                continue
            lookup = len(axes) == 2 and axes[0] == "-"
            multiplied = self.place.tied and path == self.family.word_embeddings
            # What writes the residual stream is gated where it writes: a table's columns, a norm, or
            # the rows of the projection.
            gated = tuple(
                axis in ("hidden", "embedding") and not (len(axes) == 2 and i == 1 and not lookup)
                for i, axis in enumerate(axes)
            )
            if self.place.projected:
                gated = tuple(axis == "hidden" for axis in axes)
            self._add(join(self.base, path), axes, "embeddings", gated=gated, lookup=lookup and not multiplied)

    def _add_factored(self, path: str, axis: str) -> None:
        """A word embedding as the product of a narrow table and a projection, which writes what the table wrote."""
        self._add(f"{path}.table", ("-", "-"), "embeddings", lookup=True)
        self._add(f"{path}.projection", (axis, "-"), "embeddings", gated=(not self.place.projected, False))

    def _walk_stacks(self) -> list[Sublayer]:
        sublayers: list[Sublayer] = []
        for stack in self.stacks:
            for i, root in enumerate(stack.layers):
                for spec in stack.spec.sublayers:
                    index = sum(sublayer.kind == spec.kind for sublayer in sublayers)
                    sublayers.append(self._walk_sublayer(stack.spec, spec, root, stack.start + i, index))
        return sublayers

    def _walk_sublayer(self, stack: StackSpec, spec: SublayerSpec, root: str, layer: int, index: int) -> Sublayer:
        output, norm = join(root, spec.output), join(root, spec.norm)
        rows = Space(f"{spec.kind}_row", index, self.sizes.hidden)
        spaces = self._unit_spaces(spec, index)
        place = (spec.name, spec.kind, index, layer)
        if spec.kind == "attn":
            query = join(root, spec.query)
            values, queries = spaces["vo_dim"], spaces["qk_dim"]
            sublayer = Sublayer(*place, values, rows, output, norm, query, queries, self.place.position_query(root))
        else:
            sublayer = Sublayer(*place, spaces["ffn_dim"], rows, output, norm)
        for path, axes in stack.layer.items():
            of_units = any(name in spaces for axis in axes for name in axis.split(" + "))
            if not path.startswith(spec.root) or not (of_units or path == spec.norm or path in spec.members):
                continue
            units = {name: (space, self._copies(spec, name, path)) for name, space in spaces.items()}
            writes = path in (spec.output, spec.norm)
            if path == spec.output:
                axes, units = (rows.kind, axes[1]), {**units, rows.kind: (rows, 1)}
            # Queries are gated where they are made, and need no gate on their keys as well.
            is_query = join(root, path) in (sublayer.query, sublayer.position_query)
            gated = (is_query, False) if not writes else (True,) * len(axes)
            self._add(
                join(root, path),
                axes,
                "encoder",
                sublayer=sublayer,
                units=units,
                gated=gated[: len(axes)],
                transposed=path in self.family.transposed,
                inner=path in spec.members or (path == spec.norm and self.family.pre_norm),
                **self.place.table_use(path, axes),
            )
        return sublayer

    def _walk_biases(self, sublayers: list[Sublayer]) -> None:
        """Tables of what attention adds to its scores: whole, since layers that share one lose unlike heads."""
        for stack in self.stacks:
            of_stack = range(stack.start, stack.start + len(stack.layers))
            for spec in stack.spec.sublayers:
                if "table" in spec.bias and stack.layers:
                    users = tuple(sub for sub in sublayers if sub.name == spec.name and sub.layer in of_stack)
                    path = join(stack.layers[0], spec.bias["table"])
                    self._add(path, ("-", "-"), "encoder", lookup=True, users=users)

    def _unit_spaces(self, spec: SublayerSpec, index: int) -> dict[str, Space]:
        if spec.kind == "ffn":
            return {"ffn_dim": Space("ffn_dim", index, self.sizes.ffn_dim)}
        shapes, groups = gate_shapes(self.sizes), self.sizes.num_groups
        return {axis: Space(axis, index, shapes[axis][1], groups) for axis in ("qk_dim", "vo_dim")}

    def _copies(self, spec: SublayerSpec, axis: str, path: str) -> int:
        """Entries that a unit has in a module: queries and outputs have those of every head of a group."""
        per_head = {"qk_dim": spec.query, "vo_dim": spec.output}.get(axis) == path
        return (self.sizes.heads_per_group if per_head else 1) * (self.sizes.pair if axis == "qk_dim" else 1)

    def _walk_heads(self) -> None:
        for stack in self.stacks:
            if stack.final_norm is not None:
                self._add(stack.final_norm, ("hidden",), "head", gated=(True,))
        for path, axes in self.family.pooler.items():
            self._add(join(self.base, path), axes, "head", per_sequence=True)
        by_sequence = self.place.class_name.endswith("ForSequenceClassification") and not self.family.every_token
        for path, axes in self.place.heads.items():
            # What is pooled is gated where it is read: behind the activation, whatever that makes of a zero.
            gated = tuple(i == 1 and axis == "pooler" for i, axis in enumerate(axes))
            self._add(path, axes, "head", per_sequence=by_sequence, gated=gated)
            if f"{path}.weight" not in self.shapes and not self.place.tied:
                self.mistakes.append(f"{path}.weight is missing")

    def _check(self) -> None:
        unmatched = sorted(set(self.shapes) - set(self.params) - {m.split(" ", 1)[0] for m in self.mistakes})
        if unmatched:
            shown = ", ".join(unmatched[:5]) + (f" and {len(unmatched) - 5} more" if len(unmatched) > 5 else "")
            self.mistakes.append(f"no place in the spec for {shown}")
        for stack in self.stacks:
            for spec in stack.spec.sublayers:
                root = stack.layers[0] if stack.layers else join(self.base, stack.spec.layers, "0")
                for part in filter(None, (spec.output, spec.norm, spec.query)):
                    if f"{join(root, part)}.weight" not in self.params:
                        self.mistakes.append(f"{join(root, part)}.weight is missing")
        if self.mistakes:
            raise ArchitectureError(
                f"{self.place.class_name} does not match family '{self.family.name}': " + "; ".join(self.mistakes)
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
    return _Analysis(_Placement(family, shapes, type(model).__name__, config)).run()
