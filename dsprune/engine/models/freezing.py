"""Weights that stay as they were: marked before the engine is built, so that no optimizer ever holds them."""

from __future__ import annotations

from transformers import PreTrainedModel

from dsprune.structure.layout import base_of, family_of

__all__ = ["freeze_embeddings"]


def freeze_embeddings(model: PreTrainedModel) -> list[str]:
    """Let the embeddings of a dense or compact model, with their norm and projection, get no gradients.

    What those are the family says (its table `[embeddings]`): of BERT the tables of words, positions and segments
    and the norm over their sum, as CoFi's and MLPruning's code have it. An output head that is the word embedding
    is frozen with it.

    Returns:
        Names of the frozen parameters.
    """
    family, base = family_of(model.config), base_of(model)
    parts = tuple(f"{path}." for path in family.embeddings)
    mine = {id(param) for name, param in base.named_parameters(remove_duplicate=False) if name.startswith(parts)}
    frozen = [name for name, param in model.named_parameters() if id(param) in mine]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen
