"""Tiny random models of every family: 2 layers, 32 wide, weights large enough that differences show."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dsprune.arch import family_for
from dsprune.consolidate.modeling_dsprune import factor_embedding

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
DISTIL_SIZES = {
    "vocab_size": 50,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 40,
}

FAMILIES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL_SIZES)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=32)),
    "electra-projected": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
}
HEADS = {
    "base": lambda: BertModel(BertConfig(**SIZES)),
    "token": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=9)),
    "span": lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
}


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, embedding_rank: int | None = None
) -> nn.Module:
    """A model of a family (or a BERT with another head) in eval mode, its weights drawn anew."""
    torch.manual_seed(seed)
    model = (FAMILIES | HEADS)[name]()
    if embedding_rank is not None:
        factor_embedding(model, family_for(model.config.model_type).as_dict(), embedding_rank)
    model.to(dtype).eval()
    for param in model.parameters():
        nn.init.normal_(param, std=0.2)
    return model


def tiny_batch(*, batch: int = 3, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids with some padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
