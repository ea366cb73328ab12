"""Which model a latency table belongs to: what decides over the time of a forward pass, and the parts that it has."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

from dsprune.structure.spaces import Structure, Sublayer

__all__ = ["ModelIdentity", "part_name", "parts_of"]


class ModelIdentity(BaseModel):
    """Dense sizes of a model, and what is around its layers.

    Two models of one identity take the same time, whatever their weights; what a classifier of a few labels adds is
    not told apart.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    layers: dict[str, int]
    """Layers of each stack, by its name; "" where there is but one."""
    hidden: int
    heads: int
    groups: int
    """Groups of heads that share keys and values."""
    head_dim: int
    ffn: int
    vocabulary: int
    embedding_rank: int | None
    writes_words: bool
    """Whether a head gives a score to each word of the vocabulary, for each token."""

    @classmethod
    def of(cls, structure: Structure) -> ModelIdentity:
        """The identity of a dense model."""
        sizes = structure.sizes
        vocabulary = _vocabulary(structure)
        heads = [p.shape for p in structure.params.values() if p.part == "head" and len(p.shape) == 2]
        return cls(
            family=structure.family.name,
            layers={stack.spec.name: len(stack.layers) for stack in structure.stacks},
            hidden=sizes.hidden,
            heads=sizes.num_heads,
            groups=sizes.num_groups,
            head_dim=sizes.head_dim,
            ffn=sizes.ffn_dim,
            vocabulary=vocabulary,
            embedding_rank=structure.embedding_rank,
            writes_words=structure.tied or any(vocabulary in shape for shape in heads),
        )

    def differences(self, other: ModelIdentity) -> list[str]:
        """What another model has otherwise, each with this one's value first: `hidden 384, not 768`."""
        return differences(self.model_dump(), other.model_dump())


def differences(ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    """What two tables of facts say differently, the first one's value first."""
    return [
        f"{name} {_plain(value)}, not {_plain(theirs[name])}" for name, value in ours.items() if value != theirs[name]
    ]


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " + ".join(map(str, value.values()))
    return {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)


def _vocabulary(structure: Structure) -> int:
    """Rows of the word embedding, factored or not."""
    path = structure.family.word_embeddings
    found = [p for name, p in structure.params.items() if p.lookup and f"{path}." in name]
    return max((p.shape[0] for p in found), default=0)


def part_name(structure: Structure, sublayer: Sublayer) -> str:
    """Name of what a sublayer shares its times with: its name, after that of its stack where there are several."""
    stack = structure.stack_of(sublayer.layer).spec.name
    return f"{stack} {sublayer.name}".strip()


def parts_of(structure: Structure) -> dict[str, list[Sublayer]]:
    """Sublayers that are alike, by the name of their part; they take the same time at the same sizes."""
    parts: dict[str, list[Sublayer]] = {}
    for sublayer in structure.sublayers:
        parts.setdefault(part_name(structure, sublayer), []).append(sublayer)
    return parts
