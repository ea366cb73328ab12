"""Text to text: pairs of texts, what a model writes, and how that is scored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.errors import ArchitectureError, ConfigError, DataError
from dsprune.tasks import build_task
from dsprune.tasks.kinds.seq2seq import Seq2SeqTask, TextPairs, text_scores
from tests.tasks.conftest import Write

SOURCES = ["the cat sat on a mat", "a dog", "the dog ran and ran"]
TARGETS = ["a cat", "the dog ran and sat", "dog"]


@pytest.fixture
def closing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        unk_token="[UNK]",
        eos_token="[SEP]",
        cls_token="[CLS]",
        pad_token="[PAD]",
    )


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> Path:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", {"source": SOURCES, "target": TARGETS})
    return tmp_path


def _task(folder: Path, **settings: object) -> Seq2SeqTask:
    config = TaskConfig(name="seq2seq", **{"max_target_length": 8, **settings})
    task = build_task(config, DataConfig(path=str(folder)), seed=0)
    assert isinstance(task, Seq2SeqTask)
    return task


def _load(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> TextPairs:
    data = _task(folder, **settings).load(tokenizer).evals["validation"]
    assert isinstance(data, TextPairs)
    return data


def _model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config).eval()


def test_targets_end_and_are_cut(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    data = _load(folder, closing, max_target_length=4)
    labels = data.collate([0, 1, 2])["labels"]
    end = closing.eos_token_id
    words = closing(TARGETS, add_special_tokens=False)["input_ids"]
    assert labels.tolist() == [[*words[0], end, -100], [*words[1][:3], end], [*words[2], end, -100, -100]]
    assert data.targets.tolist() == [3, 4, 2]
    assert data.notes == ("validation: 1 of 3 targets are cut at 4 tokens",)
    assert list(data.references) == TARGETS


def test_a_prefix_stands_before_every_source(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    plain, prefixed = (_load(folder, closing, prefix=prefix).collate([1]) for prefix in ("", "the mat "))
    two = closing("the mat", add_special_tokens=False)["input_ids"]
    assert prefixed["input_ids"][0].tolist()[1:3] == two
    assert prefixed["input_ids"].shape[1] == plain["input_ids"].shape[1] + 2


def test_the_decoder_reads_the_targets_one_place_later(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    model = _model(closing)
    batch = _load(folder, closing).collate([0, 1])
    labels = batch.pop("labels")
    arguments = _task(folder).arguments(model, batch, labels)
    assert arguments["decoder_input_ids"][1].tolist() == [closing.pad_token_id, *labels[1, :-1].tolist()]


def test_what_is_written_does_not_depend_on_the_batch(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    model, task, data = _model(closing), _task(folder), _load(folder, closing)
    head = VocabularyHead(model.get_output_embeddings())

    def write(indices: list[int]) -> torch.Tensor:
        batch = data.collate(indices)
        return task.predict(model, head, batch, batch.pop("labels"))

    together = write([0, 1, 2])
    assert together.shape == (3, 8)
    assert torch.equal(together, torch.cat([write([i]) for i in range(3)]))
    scores = task.score(together.float(), data)
    assert set(scores) == {"rougeL", "exact"}


def test_right_answers_score_full(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    data = _load(folder, closing)
    labels = data.collate([0, 1, 2])["labels"]
    right = labels.masked_fill(labels < 0, closing.pad_token_id)
    assert _task(folder).score(right.float(), data) == {"rougeL": 1.0, "exact": 1.0}


def test_scores_by_hand() -> None:
    # The longest common subsequence is "the cat sat": precision 3/3, recall 3/4.
    scores = text_scores(["the cat sat", " Same. "], ["the black cat sat", "Same."])
    assert scores["rougeL"] == pytest.approx((2 * 1 * 0.75 / 1.75 + 1) / 2)
    assert scores["exact"] == 0.5


def test_figures_say_which_tokens_rouge_has_where_it_matters(
    tmp_path: Path, write: Write, closing: PreTrainedTokenizerFast
) -> None:
    write(tmp_path / "train.parquet", {"source": SOURCES, "target": ["кот", "собака", "кот"]})
    write(tmp_path / "validation.parquet", {"source": SOURCES, "target": ["кот", "a dog", "naïve cat"]})
    data = _task(tmp_path).load(closing)
    assert data.notes == (
        "validation: rougeL is of Unicode words (of characters, in scripts without spaces); rouge_score's default "
        "tokenizer, which reads a-z and 0-9 only, would read 2 of 3 targets otherwise",
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"source": SOURCES}, "no column 'target' of task 'seq2seq'"),
        ({"source": SOURCES, "target": ["a", " ", "b"]}, "row 1 .* expected text that is not blank"),
    ],
)
def test_pairs_that_cannot_be_are_told(
    tmp_path: Path, write: Write, closing: PreTrainedTokenizerFast, columns: dict[str, list], message: str
) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", columns)
    with pytest.raises(DataError, match=message):
        _task(tmp_path).load(closing)


def test_a_tokenizer_without_an_end_of_text_is_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ArchitectureError, match="no end-of-sequence token"):
        _task(folder).load(tokenizer)


def test_no_data_set_is_no_task() -> None:
    with pytest.raises(ConfigError, match=r"give data\.dataset, or a local folder"):
        build_task(TaskConfig(name="seq2seq"), DataConfig(), seed=0)
