"""Factoring a word embedding into a narrow table and a projection, before pruning begins.

GRAIN (arXiv 2212.07634, section 3.5): the singular value decomposition E = U S V^T, cut to rank r, gives
the table U S and the projection V; both are trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsprune.arch import family_for
from dsprune.consolidate import EMBEDDING_RANK, factor_embedding
from dsprune.engine.zero.gather import gathered
from dsprune.errors import ConfigError
from dsprune.structure.layout import word_embedding_of

__all__ = ["check_rank", "factor_word_embedding"]


def check_rank(model: PreTrainedModel, rank: int) -> None:
    """See that the word embedding can be factored, and that this saves parameters.

    Raises:
        ConfigError: it would not, or an output head is tied to it.
    """
    if getattr(model.config, "tie_word_embeddings", False) and model.get_output_embeddings() is not None:
        raise ConfigError(
            f"prune.embedding_rank = {rank}: the output head of {type(model).__name__} is the word embedding, which "
            "has to stay whole for it"
        )
    rows, width = _shape(word_embedding_of(model).weight)
    most = (rows * width - 1) // (rows + width)
    if rank > most:
        raise ConfigError(
            f"prune.embedding_rank = {rank}: the word embedding is {rows} x {width}, and factors of a rank above "
            f"{most} are larger than that"
        )


def _shape(weight: Tensor) -> tuple[int, int]:
    rows, width = getattr(weight, "ds_shape", weight.shape)
    return int(rows), int(width)


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Table [rows, rank] and projection [width, rank] whose product is the nearest of that rank."""
    # The right singular vectors are the eigenvectors of E^T E, which is only width x width.
    wide = weight.detach().double()
    _, vectors = torch.linalg.eigh(wide.T @ wide)
    right = vectors.flip(-1)[:, :rank]
    return (wide @ right).to(weight.dtype), right.to(weight.dtype)


def factor_word_embedding(model: PreTrainedModel, rank: int) -> None:
    """Replace a dense model's word embedding by its factors. Collective under ZeRO-3: all ranks must call.

    The configuration remembers the rank, so that a checkpoint can be read without the model.

    Raises:
        ConfigError: the factors would be larger than the table.
    """
    check_rank(model, rank)
    dense = word_embedding_of(model)
    with gathered(dense.weight):
        table, projection = _factors(dense.weight, rank)
    factor_embedding(model, family_for(str(model.config.model_type)).as_dict(), rank)
    factored = word_embedding_of(model)
    for part, value in ((factored.table, table), (factored.projection, projection)):
        part.weight = torch.nn.Parameter(value.contiguous())
    setattr(model.config, EMBEDDING_RANK, rank)
