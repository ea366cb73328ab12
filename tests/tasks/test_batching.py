from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ArchitectureError
from dsprune.tasks import batching, build_task
from dsprune.tasks.batching import Encoded, Tokeniser, Tokens, encode

FIRST = ["the cat sat", "a dog", "the cat sat on a mat and the dog ran"]
SECOND = ["a mat", "the dog ran", "the cat"]
LABELS = torch.tensor([0, 1, 1])


def build(tokenizer: PreTrainedTokenizerFast, *texts: list[str], max_length: int = 128) -> Encoded:
    return encode("train", texts, LABELS, Tokeniser(tokenizer, max_length, tokenizer.pad_token_id))


def test_collating_equals_what_the_tokenizer_pads(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = build(tokenizer, FIRST, SECOND)
    chosen = [2, 0]
    batch = encoded.collate(chosen)
    expected = tokenizer([FIRST[i] for i in chosen], [SECOND[i] for i in chosen], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == torch.int64
    assert batch["labels"].tolist() == [1, 0]
    assert encoded.lengths.tolist() == [8, 8, 15]
    assert encoded.targets.tolist() == [1, 1, 1]


def test_batches_are_as_wide_as_their_longest(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = build(tokenizer, FIRST)
    assert encoded.collate(torch.tensor([0, 1]))["input_ids"].shape == (2, 5)
    assert encoded.collate([1])["input_ids"].shape == (1, 4)
    padded = encoded.collate([0, 1], pad_multiple=8)
    assert padded["input_ids"].shape == (2, 8)
    assert padded["attention_mask"].sum(1).tolist() == [5, 4]
    assert (padded["input_ids"][:, 5:] == tokenizer.pad_token_id).all()


def test_one_sentence_is_one_segment(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = build(tokenizer, FIRST).collate([0, 1, 2])
    assert (batch["token_type_ids"] == 0).all()


def test_no_token_types_where_the_model_reads_none(tokenizer: PreTrainedTokenizerFast) -> None:
    names = tokenizer.model_input_names
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    try:
        batch = build(tokenizer, FIRST, SECOND).collate([0])
    finally:
        tokenizer.model_input_names = names
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_long_examples_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = build(tokenizer, FIRST, SECOND, max_length=8)
    assert encoded.lengths.tolist() == [8, 8, 8]
    ids = encoded.collate([2])["input_ids"]
    assert (ids == tokenizer.sep_token_id).sum() == 2


def test_chunks_are_joined(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(tokenizer, FIRST, SECOND)
    monkeypatch.setattr(batching, "CHUNK", 2)
    chunked = build(tokenizer, FIRST, SECOND)
    for name, tensor in whole.collate([0, 1, 2]).items():
        assert torch.equal(tensor, chunked.collate([0, 1, 2])[name])


def test_labels_of_tokens_are_padded_with_what_no_loss_counts() -> None:
    tokens = Tokens(torch.tensor([5, 6, 7, 8], dtype=torch.int32), torch.tensor([3, 1]), pad_token_id=0)
    labels = torch.tensor([-100, 2, 1, 3], dtype=torch.int8)
    encoded = Encoded("train", tokens, labels, per_token=True, targets=torch.tensor([2, 1]))
    batch = encoded.collate([1, 0], pad_multiple=4)
    assert batch["labels"].tolist() == [[3, -100, -100, -100], [-100, 2, 1, -100]]
    assert batch["labels"].dtype == torch.int64
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_token_ids_that_the_model_has_not_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ArchitectureError, match=r"token id 12 and the model has 12 embeddings"):
        encode("train", [FIRST], LABELS, Tokeniser(tokenizer, 128, tokenizer.pad_token_id, vocab_size=12))
    assert len(encode("train", [FIRST], LABELS, Tokeniser(tokenizer, 128, tokenizer.pad_token_id, vocab_size=13))) == 3


def test_a_tokenizer_without_padding_token_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    with pytest.raises(ArchitectureError, match="no padding token"):
        build_task(TaskConfig(name="order"), DataConfig(), seed=0).load(bare)
