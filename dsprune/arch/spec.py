"""Model families as data: which module axes live in which prunable space.

A family is one TOML file in `families/`. This module reads it; `dsprune.structure` lays it over a
model and checks that it accounts for every parameter.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

from dsprune.errors import ArchitectureError

__all__ = [
    "FamilySpec",
    "PositionsSpec",
    "StackSpec",
    "SublayerSpec",
    "family_for",
    "list_families",
    "load_family",
]

Axes = tuple[str, ...]
StockHeads = Literal["equal", "divides", "free", "all"]


@dataclass(frozen=True)
class SublayerSpec:
    """The parts of an attention or FFN sublayer, as paths inside a layer."""

    name: str
    """What it is called among the sublayers of a layer."""
    output: str
    """Linear whose rows write the residual stream and whose columns read the sublayer's units."""
    norm: str
    """Norm that follows the residual add; in a pre-norm family, the norm of what the sublayer reads."""
    skip: Mapping[str, str]
    """How a removed sublayer is bypassed: module -> which of its arguments it returns instead of computing."""
    cached: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Integers that modules cache: path -> attribute -> formula over `heads` and `head_dim`."""
    idle: Mapping[str, str] = field(default_factory=dict)
    """How a sublayer without units that keeps its output bias is run: as `skip`, or the name of the child that
    answers instead."""
    query: str = ""
    """Linear of the queries; attention only. Where queries share a weight with keys and values, they come first."""
    members: tuple[str, ...] = ()
    """Other modules of the sublayer that hold parameters of no unit, and go when its last unit goes."""
    root: str = ""
    """What the paths of its modules begin with, where a layer has several sublayers of a kind."""
    bias: Mapping[str, str] = field(default_factory=dict)
    """How attention is given what it adds to its scores, and hands it to the next layer as its second result:
    `argument` is its name as an argument. Where it comes from an embedding with a column for each head, which
    stands in the first layer of the stack and serves all its layers: `table`, its path; `flag`, the attribute by
    which attention knows that it holds the table; `compute`, the method that reads it."""
    maps: str = ""
    """Module whose output is the attention maps; without it, the second output of the module that owns the query."""
    scales_by_size: bool = False
    """Whether scores are divided by the root of the size that heads have when they run, times the number of products
    that they are the sum of; without it, by a number that the module keeps."""

    @property
    def kind(self) -> Literal["attn", "ffn"]:
        return "attn" if self.query else "ffn"


@dataclass(frozen=True)
class StackSpec:
    """Layers of one make, one after the other; an encoder-decoder has two such stacks."""

    name: str
    """Empty where there is but one."""
    layers: str
    """List of layers, inside the base."""
    count: str
    """Which of the sizes is the number of layers."""
    layer: Mapping[str, Axes]
    sublayers: tuple[SublayerSpec, ...]
    """In the order in which they run; one of them is the FFN."""
    final_norm: str | None = None
    """Norm of the residual stream after the last layer, inside the base."""
    embedding: str | None = None
    """Module that looks up the word embedding for this stack, where that is not the module which owns it."""


@dataclass(frozen=True)
class PositionsSpec:
    """Relative positions: a table as wide as the residual stream, which the attention of every layer reads."""

    table: str
    """Embedding inside the base; the module that holds it reads it as a whole."""
    norm: str
    """LayerNorm of the table inside the base, if there is one."""
    reader: str
    """Module of a layer that hands the table to its attention."""
    query: str
    """Linear of a layer that makes queries of the table, if it has its own: gated with the queries of tokens."""
    key: str
    """Linear of a layer that makes keys of the table, if it has its own."""
    shared: str
    """Name in the configuration: whether the linears of the tokens' queries and keys read the table as well."""
    products: Mapping[str, list[str]]
    """List in the configuration -> those of its entries that stand for a product of queries or keys with the table."""

    def count_products(self, config: object) -> int:
        """Products with the table that scores hold, beside that of queries with keys."""
        return sum(
            entry in (getattr(config, name, None) or ()) for name, entries in self.products.items() for entry in entries
        )


@dataclass(frozen=True)
class FamilySpec:
    """One model family: where its layers are and which space each weight axis lives in.

    A TOML file with one stack of layers, of one attention and one FFN each, has the keys of the stack (`layers`,
    `layer`, `attention`, `ffn`, `final_norm`) at its top.

    The mappings give the axes of each module's weight, output axis first; `"-"` is an axis that
    pruning leaves alone, `"a + b"` one that holds the entries of two spaces, one after the other,
    `"pooler"` what a linear pools of each sequence for the linear that classifies it. A module's bias
    follows its first axis.
    """

    name: str
    model_types: tuple[str, ...]
    base: str
    """Attribute of a model with a head that holds everything else; empty where the parts stand beside the head."""
    stacks: tuple[StackSpec, ...]
    sizes: Mapping[str, str]
    word_embeddings: str
    embeddings: Mapping[str, Axes]
    pooler: Mapping[str, Axes]
    heads: Mapping[str, Mapping[str, Axes]]
    embedding_projection: str | None = None
    embedding_output: str | None = None
    """Module that gives out the summed embeddings, where the owner of the word embedding does not."""
    pre_norm: bool = False
    """Whether sublayers read the normed residual stream and add to the bare one, instead of norming the sum."""
    positions: PositionsSpec | None = None
    """Relative positions that attention reads from a table of their own."""
    rotary: bool = False
    """Whether queries and keys are rotated, dimension i of a head together with i + head_dim / 2."""
    transposed: frozenset[str] = frozenset()
    """Modules of a layer that store their weight input axis first."""
    every_token: bool = False
    """Whether the head for sequences computes all tokens, of which one is read."""
    needs_layer: bool = False
    """Whether the stock encoder cannot run without a layer: one that does nothing then stays."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Sizes that a configuration may leave out: formula over the other sizes."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """What a configuration must say, if it says anything."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Kinds of gates that cannot be exported exactly, each with the reason."""
    offset_positions: bool = False
    """Whether the first token's position is the one behind the padding token's id: the rows before are no token's."""
    stock_heads: StockHeads = "equal"
    """What the stock class demands of heads times head size: the hidden size ("equal"), a hidden size that the
    number of heads divides ("divides"), nothing ("free"), or that none is missing ("all")."""
    scaled_head: str | None = None
    """Key of the configuration by which the stock class scales what the head reads by hidden size ** -0.5, and the
    head is the word embedding; where it is false, neither."""

    def refusal(self, kinds: Iterable[str]) -> str | None:
        """Why gates of these kinds cannot be exported exactly; None where they can."""
        for kind in kinds:
            if kind in self.refused:
                return f"family '{self.name}' cannot lose units of '{kind}': {self.refused[kind]}"
        return None

    def usable_positions(self, config: Any) -> int | None:
        """Tokens of the longest sequence that a model of this configuration reads; None where it tells no limit."""
        rows = getattr(config, "max_position_embeddings", None)
        if rows is None:
            return None
        return int(rows) - (int(config.pad_token_id or 0) + 1 if self.offset_positions else 0)

    @property
    def blocks_refusal(self) -> str | None:
        """Why blocks cannot be removed from the family's matrices; None where they can."""
        if self.transposed:
            return f"family '{self.name}' cannot lose blocks: its weights are stored input axis first"
        return None

    def as_dict(self) -> dict[str, Any]:
        """The spec as plain data, as it stands in the TOML file."""
        return _read_family(self.name)


_OPTIONAL = (
    "embedding_projection",
    "embedding_output",
    "pre_norm",
    "rotary",
    "every_token",
    "needs_layer",
    "defaults",
    "requires",
    "refused",
    "offset_positions",
    "stock_heads",
    "scaled_head",
)
_FIRST_STACK = ("attention", "ffn")
"""Sublayers of the only stack, where there is one."""


def _sublayer(name: str, table: Mapping[str, Any]) -> SublayerSpec:
    return SublayerSpec(**{**table, "name": name, "members": tuple(table.get("members", ()))})


def _stack(name: str, table: Mapping[str, Any]) -> StackSpec:
    return StackSpec(
        name=name,
        layers=table["layers"],
        count=table.get("count", "num_layers"),
        layer=_axes(table["layer"]),
        sublayers=tuple(_sublayer(key, table[key]) for key in table.get("sublayers", _FIRST_STACK)),
        final_norm=table.get("final_norm"),
        embedding=table.get("embedding"),
    )


def _axes(table: Mapping[str, list[str]]) -> dict[str, Axes]:
    return {path: tuple(axes) for path, axes in table.items()}


def _read_family(name: str) -> dict[str, Any]:
    resource = resources.files("dsprune.arch") / "families" / f"{name}.toml"
    return tomllib.loads(resource.read_text(encoding="utf-8"))


@cache
def load_family(name: str) -> FamilySpec:
    """Read the spec of one family by the name of its file.

    Raises:
        ArchitectureError: no such family.
    """
    if name not in list_families():
        raise ArchitectureError(f"unknown model family '{name}': there are {', '.join(list_families())}")
    data = _read_family(name)
    return FamilySpec(
        name=name,
        model_types=tuple(data["model_types"]),
        base=data["base"],
        stacks=tuple(_stack(stack, table) for stack, table in data.get("stacks", {"": data}).items()),
        sizes=data["sizes"],
        word_embeddings=data["word_embeddings"],
        embeddings=_axes(data["embeddings"]),
        pooler=_axes(data.get("pooler", {})),
        heads={kind: _axes(table) for kind, table in data["heads"].items()},
        transposed=frozenset(data.get("transposed", ())),
        positions=PositionsSpec(**data["positions"]) if "positions" in data else None,
        **{key: data[key] for key in _OPTIONAL if key in data},
    )


def list_families() -> list[str]:
    """Names of the families that ship with dsprune."""
    folder = resources.files("dsprune.arch") / "families"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def family_for(model_type: str) -> FamilySpec:
    """The family of a `config.model_type`.

    Raises:
        ArchitectureError: no family covers this type.
    """
    for name in list_families():
        family = load_family(name)
        if model_type in family.model_types:
            return family
    known = sorted(kind for name in list_families() for kind in load_family(name).model_types)
    raise ArchitectureError(
        f"model type '{model_type}' is not supported: supported are {', '.join(known)} (CONTRIBUTING.md: add a family)"
    )
