"""Tiny random models of every family: 2 layers, 32 wide, weights large enough that differences show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from dsprune.arch import family_for
from dsprune.consolidate import with_own_head
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

GROUPED_SIZES = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
GPT2_SIZES = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "n_positions": 40}
GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
T5_SIZES = {"vocab_size": 50, "d_model": 32, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5_SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
FLAN_SIZES = {
    **T5_SIZES,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

V3 = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 6, "share_att_key": True}
V3 |= {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "type_vocab_size": 0}
V2 = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 7, "type_vocab_size": 2}
V2 |= {"embedding_size": 16}
"""Positions in buckets, read by the linears of the tokens and normed; and positions read by linears of their own, bare,
under narrower embeddings."""

FAMILIES = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTIL_SIZES)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=32)),
    "electra-projected": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
    "deberta-v2": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **V3)),
    "deberta-v2-unshared": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**SIZES, **V2)),
}
DECODERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED_SIZES)),
    "llama-biased": lambda: LlamaForCausalLM(
        LlamaConfig(**GROUPED_SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED_SIZES, head_dim=16, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED_SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED_SIZES, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
}
"""Decoders that write text: tied and untied heads, biased and not, heads of the width of the model and wider."""
CLASSIFIERS = {
    "llama-sequence": lambda: LlamaForSequenceClassification(LlamaConfig(**GROUPED_SIZES)),
    "qwen2-sequence": lambda: Qwen2ForSequenceClassification(Qwen2Config(**GROUPED_SIZES)),
    "gpt2-sequence": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2_SIZES)),
    "qwen2-base": lambda: Qwen2Model(Qwen2Config(**GROUPED_SIZES)),
}
"""The same families under other heads."""
ENCODER_DECODERS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5_SIZES)),
    "flan-t5": lambda: _flan(),
}
"""One with plain FFNs and a head that is the word embedding, one with gated FFNs, a head of its own, and an encoder
deeper than its decoder."""
BARE_T5 = {
    "t5-base": lambda: T5Model(T5Config(**T5_SIZES)),
    "t5-encoder": lambda: T5EncoderModel(T5Config(**T5_SIZES)),
}
HEADS = {
    "base": lambda: BertModel(BertConfig(**SIZES)),
    "token": lambda: BertForTokenClassification(BertConfig(**SIZES, num_labels=9)),
    "span": lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
    "deberta-token": lambda: DebertaV2ForTokenClassification(DebertaV2Config(**SIZES, **V3, num_labels=9)),
    "deberta-span": lambda: DebertaV2ForQuestionAnswering(DebertaV2Config(**SIZES, **V2 | {"pos_att_type": ["c2p"]})),
    "deberta-base": lambda: DebertaV2Model(
        DebertaV2Config(**SIZES, **V3 | {"pos_att_type": ["p2c"], "norm_rel_ebd": "none"})
    ),
}
TEACHERS = {
    "bert-deep": lambda: BertForSequenceClassification(
        BertConfig(**SIZES | {"num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 40})
    ),
}
"""Deeper and wider than their students."""
ALL = TEACHERS | FAMILIES | HEADS | DECODERS | CLASSIFIERS | ENCODER_DECODERS | BARE_T5


def _flan() -> nn.Module:
    config = T5Config(**FLAN_SIZES)
    return with_own_head(T5ForConditionalGeneration, config, lambda: T5ForConditionalGeneration(config))


def tiny_model(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, embedding_rank: int | None = None
) -> nn.Module:
    """A model of a family (or a BERT with another head) in eval mode, its weights drawn anew."""
    torch.manual_seed(seed)
    model = ALL[name]()
    if embedding_rank is not None:
        factor_embedding(model, family_for(model.config.model_type).as_dict(), embedding_rank)
    model.to(dtype).eval()
    for param in model.parameters():
        nn.init.normal_(param, std=0.2)
    return model


def _norm_in_own_precision(module: Any, x: Tensor) -> Tensor:
    """An RMSNorm as the stock classes have it, without their cast to fp32, which would hide what fp64 is to show."""
    wide = x.double() if x.dtype is torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * normed.to(x.dtype)


for _norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, T5LayerNorm):
    _norm.forward = _norm_in_own_precision


def batch_for(model: Any, **sizes: int) -> dict[str, Tensor]:
    """`tiny_batch`, and for an encoder-decoder what its decoder reads."""
    batch = tiny_batch(**sizes)
    if not model.config.is_encoder_decoder:
        return batch
    return {**batch, "decoder_input_ids": batch["input_ids"].flip(0, 1).contiguous()}


def tiny_batch(*, batch: int = 3, length: int = 9, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids with some padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
