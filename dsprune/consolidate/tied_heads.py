"""Heads that are the word embedding, and heads that are not, in classes that cannot tell the two apart.

`transformers` ties the head of a T5 whatever its configuration says, and finds out that it should not have when
a checkpoint holds both weights and they differ. Without weights, or with weights in ZeRO-3 partitions, it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PretrainedConfig

from dsprune.arch import family_for, list_families, load_family
from dsprune.consolidate import modeling_dsprune

__all__ = ["auto_with_own_head", "own_head_keys", "with_own_head"]

T = TypeVar("T")


def own_head_keys(model_type: str) -> dict[str, Any]:
    """What a configuration has to say of a head that is not the word embedding, whatever it said before.

    Where the key that everybody reads means something else as well (T5: whether the head's inputs are scaled), it is
    left as it is, and a key of our own says it.

    Args:
        model_type: of a dense or compact model.
    """
    family = family_for(model_type.removeprefix("dsprune_"))
    return {"tie_word_embeddings": False} if family.scaled_head is None else {modeling_dsprune.OWN_HEAD: True}


def with_own_head(cls: Any, config: PretrainedConfig, make: Callable[[], T]) -> T:
    """A model whose head has a weight of its own, where the family's configuration says so.

    Args:
        cls: stock class of the model.
        config: of the model.
        make: makes it.
    """
    families = [load_family(name) for name in list_families()]
    family = next((family for family in families if config.model_type in family.model_types), None)
    if family is None or family.scaled_head is None:
        return make()
    every = cls._tied_weights_keys
    tied = modeling_dsprune.tied_weights(cls, family.as_dict(), config)
    cls._tied_weights_keys = tied
    try:
        model: Any = make()
    finally:
        cls._tied_weights_keys = every
    # From now on it is this model that asks, whoever ties weights again.
    model._tied_weights_keys = tied
    return model  # type: ignore[no-any-return]


def auto_with_own_head(auto: Any, config: PretrainedConfig, make: Callable[[], T]) -> T:
    """`with_own_head` for a model that one of the Auto classes makes."""
    if type(config) not in auto._model_mapping:
        return make()
    return with_own_head(auto._model_mapping[type(config)], config, make)
