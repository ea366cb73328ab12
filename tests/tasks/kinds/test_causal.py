"""Language modelling: packed sequences in which every token is predicted once, and perplexities."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.errors import ArchitectureError, ConfigError, DataError, NumericsError
from dsprune.tasks import build_task
from dsprune.tasks.kinds.causal import CausalTask, PackedText
from tests.tasks.conftest import Write

TEXTS = [" the cat sat on a mat", "", "a dog ran and the dog sat", "  \n", "the mat", "and a cat and a dog and a mat"]
NUM_WORDS = 6 + 7 + 2 + 9


@pytest.fixture
def closing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer with an end of text, and nothing to pad with."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]")


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> Path:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", {"text": TEXTS})
    return tmp_path


def _task(folder: Path, **settings: object) -> CausalTask:
    config = TaskConfig(name="lm", **{"max_length": 8, "logits_chunk": 3, **settings})
    task = build_task(config, DataConfig(path=str(folder)), seed=0)
    assert isinstance(task, CausalTask)
    return task


def _load(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings: object) -> PackedText:
    data = _task(folder, **settings).load(tokenizer).evals["validation"]
    assert isinstance(data, PackedText)
    return data


def _stream(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What is to be predicted: all documents, each closed."""
    end = tokenizer.eos_token_id
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS if text.strip()]
    return [token for document in documents for token in (*document, end)]


@pytest.mark.parametrize("length", [8, 9, 14, 28, 100])
def test_every_token_is_predicted_once_after_the_one_before_it(
    folder: Path, closing: PreTrainedTokenizerFast, length: int
) -> None:
    data = _load(folder, closing, max_length=length)
    stream = _stream(closing)
    batch = data.collate(range(len(data)))
    real = batch["attention_mask"].bool()
    assert batch["labels"][real].tolist() == stream
    assert batch["input_ids"][real].tolist() == [closing.eos_token_id, *stream[:-1]]
    assert set(batch["labels"][~real].tolist()) <= {-100}
    assert data.lengths.tolist() == [length] * (len(stream) // length) + [len(stream) % length] * (
        len(stream) % length > 0
    )
    assert int(data.targets.sum()) == len(stream) == NUM_WORDS + 4
    assert data.num_words == NUM_WORDS


def test_a_stream_begins_with_the_token_that_begins_a_text(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    both = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]", bos_token="[CLS]"
    )
    ids = _load(folder, both).collate([0])["input_ids"][0].tolist()
    assert ids[0] == both.bos_token_id
    assert both.bos_token_id not in ids[1:]


@pytest.mark.parametrize("batch", [1, 3])
def test_perplexities_are_those_of_all_logits(folder: Path, closing: PreTrainedTokenizerFast, batch: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(closing), **sizes)).eval()
    task, data = _task(folder), _load(folder, closing)
    total = 0.0
    with torch.no_grad():
        for i in range(len(data)):
            example = data.collate([i])
            logits = model(input_ids=example["input_ids"]).logits
            total += F.cross_entropy(logits[0], example["labels"][0], reduction="sum", ignore_index=-100).item()
        head = VocabularyHead(model.get_output_embeddings())
        found = []
        for start in range(0, len(data), batch):
            inputs = data.collate(range(start, min(start + batch, len(data))))
            labels = inputs.pop("labels")
            found.append(task.predict(model, head, inputs, labels))
    scores = task.score(torch.cat(found), data)
    assert scores["perplexity"] == pytest.approx(math.exp(total / (NUM_WORDS + 4)), rel=1e-5)
    assert scores["word_perplexity"] == pytest.approx(math.exp(total / NUM_WORDS), rel=1e-5)


def test_less_perplexity_is_more_merit(folder: Path) -> None:
    task = _task(folder)
    assert task.merit({"perplexity": 20.0, "word_perplexity": 1.0}) > task.merit({"perplexity": 30.0})
    of_several = {"validation/perplexity": 20.0, "test/perplexity": 1000.0}
    assert task.merit(of_several) == -20.0
    assert _task(folder, metric="word_perplexity").merit({"perplexity": 1.0, "word_perplexity": 9.0}) == -9.0


def test_surprisals_that_are_not_finite_are_refused(folder: Path, closing: PreTrainedTokenizerFast) -> None:
    data = _load(folder, closing)
    with pytest.raises(NumericsError, match="1 of 4 examples"):
        _task(folder).score(torch.tensor([[1.0], [math.nan], [1.0], [1.0]]), data)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": TEXTS}, "no column 'text' of task 'lm'; there is sentence"),
        ({"text": ["", " "]}, "column 'text' holds no text, only blank rows"),
        ({"text": [1, 2]}, r"row 0 \(from 0\), column 'text': expected text, found 1"),
    ],
)
def test_texts_that_cannot_be_are_told(
    tmp_path: Path, write: Write, closing: PreTrainedTokenizerFast, columns: dict[str, list], message: str
) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", columns)
    with pytest.raises(DataError, match=message):
        _task(tmp_path).load(closing)


def test_another_column_can_be_named(tmp_path: Path, write: Write, closing: PreTrainedTokenizerFast) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.jsonl", {"document": TEXTS})
    assert _load(tmp_path, closing, text_column="document").num_words == NUM_WORDS


def test_a_tokenizer_without_an_end_of_text_is_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ArchitectureError, match="no end-of-sequence token"):
        _task(folder).load(tokenizer)


def test_an_encoder_is_refused() -> None:
    from dsprune.engine.models.load import check_reads_forward

    with pytest.raises(ArchitectureError, match="'bert' reads text both ways"):
        check_reads_forward("x", SimpleNamespace(model_type="bert", is_decoder=False))
    for decoder in (SimpleNamespace(model_type="llama"), SimpleNamespace(model_type="bert", is_decoder=True)):
        check_reads_forward("x", decoder)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"evals": ("test",)}, "name each split once, and one beside 'test'"),
        ({"subset": "a"}, "give data.dataset as well"),
    ],
)
def test_data_settings_that_cannot_be_are_told(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(name="lm"), DataConfig(**data), seed=0)


def test_a_task_with_its_own_data_takes_no_other() -> None:
    with pytest.raises(
        ConfigError,
        match=r"data\.dataset: for tasks text_classification, .*, lm, seq2seq, span_corruption only; 'sst2' has",
    ):
        build_task(TaskConfig(name="sst2"), DataConfig(dataset="x"), seed=0)


def test_the_hub_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read(dataset: str, subset: str | None, split: str, **_: object) -> None:
        asked.append((dataset, subset, split))
        raise DataError("stop")

    monkeypatch.setattr("dsprune.tasks.sources.readers.read_hub", read)
    for data in (DataConfig(), DataConfig(dataset="allenai/c4", subset="en")):
        with pytest.raises(DataError, match="stop"):
            build_task(TaskConfig(name="lm"), data, seed=0).read(False)
    assert asked == [("Salesforce/wikitext", "wikitext-2-v1", "validation"), ("allenai/c4", "en", "validation")]
