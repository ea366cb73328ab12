"""Where things are in a live model, dense or compact: base, layers, word embedding, head, tables that are only read.

A family spec says it of the family; here it is found in one model, whose base may be the model itself, and of which
pruning may have taken layers or attentions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dsprune.arch import FamilySpec, StackSpec, family_for
from dsprune.structure.spaces import join

__all__ = [
    "attention_map_modules",
    "base_of",
    "base_path",
    "family_of",
    "head_paths",
    "hidden_state_modules",
    "layer_paths",
    "layer_stacks",
    "output_path",
    "position_table",
    "word_embedding_of",
]


def family_of(config: Any) -> FamilySpec:
    """The family of a dense or compact model, by its configuration.

    Raises:
        ArchitectureError: there is none.
    """
    return family_for(str(config.model_type).removeprefix("dsprune_"))


def base_path(model: nn.Module) -> str:
    """Path of the model without its head: `bert` of a BertForSequenceClassification, empty of a BertModel."""
    family = family_of(model.config)
    return family.base if family.base and hasattr(model, family.base) else ""


def base_of(model: nn.Module) -> nn.Module:
    """The model without its head."""
    return model.get_submodule(base_path(model))


def _stacks(model: nn.Module) -> list[tuple[StackSpec, list[str]]]:
    """The stacks of layers that a model has, and the paths of their layers from its root."""
    base, found = base_path(model), []
    for stack in family_of(model.config).stacks:
        if hasattr(model.get_submodule(base), stack.layers.split(".")[0]):
            root = join(base, stack.layers)
            count = len(list(model.get_submodule(root).children()))
            found.append((stack, [f"{root}.{i}" for i in range(count)]))
    return found


def layer_paths(model: nn.Module) -> list[str]:
    """Paths of the layers, stack after stack: `["bert.encoder.layer.0", ...]`."""
    return [path for _, paths in _stacks(model) for path in paths]


def layer_stacks(model: nn.Module) -> tuple[int, ...]:
    """For each layer, which stack it stands in: 0 for those that read the inputs, 1 for a decoder beside an encoder."""
    return tuple(i for i, (_, paths) in enumerate(_stacks(model)) for _ in paths)


def hidden_state_modules(model: nn.Module, *, embeddings: bool) -> list[str]:
    """Paths of the modules whose outputs are the hidden states: the layers, and after them the embeddings if wanted."""
    family, base = family_of(model.config), base_of(model)
    module = family.stacks[0].embedding or family.word_embeddings.split(".")[0]
    if family.embedding_projection is not None and hasattr(base, family.embedding_projection):
        module = family.embedding_projection
    module = family.embedding_output or module
    return layer_paths(model) + ([join(base_path(model), module)] if embeddings else [])


def attention_map_modules(model: nn.Module) -> list[str]:
    """Paths of the modules that hand out attention maps, one a layer; cross attention is not among them."""
    modules = dict(model.named_modules())
    found = []
    for stack, paths in _stacks(model):
        spec = stack.sublayers[0]
        owner = spec.query.rpartition(".")[0]
        # Of an attention that is gone only the place is left, and what stands there gives out no map.
        places = ((f"{layer}.{spec.maps or owner}", f"{layer}.{owner}") for layer in paths)
        found += [maps if maps in modules else place for maps, place in places]
    return found


def word_embedding_of(model: nn.Module) -> Any:
    """The module of the word embedding: one table, or the two factors of one."""
    return base_of(model).get_submodule(family_of(model.config).word_embeddings)


def head_paths(family: FamilySpec, class_name: str) -> tuple[str, ...]:
    """Paths of the linears of a head, in the order of the forward pass; empty for a class without one."""
    tables = (tuple(table) for kind, table in family.heads.items() if class_name.endswith(kind))
    return next(tables, ())


def output_path(model: nn.Module) -> str:
    """Path of the linear of a model's head whose rows are the outputs."""
    return head_paths(family_of(model.config), type(model).__name__)[-1]


def position_table(model: nn.Module) -> tuple[nn.Module, Any] | None:
    """The module that reads a table of positions without calling it, and the table; None where there is none."""
    family = family_of(model.config)
    if family.positions is None:
        return None
    owner, _, name = family.positions.table.rpartition(".")
    reader = base_of(model).get_submodule(owner)
    table = getattr(reader, name, None)
    return None if table is None else (reader, table)
