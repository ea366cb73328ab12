"""Span corruption: what is dropped can be put back, is a function of its place alone, and is scored token by token."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from dsprune.config import DataConfig, TaskConfig
from dsprune.distill import VocabularyHead
from dsprune.errors import ArchitectureError, ConfigError, DataError, NumericsError
from dsprune.tasks import build_task
from dsprune.tasks.kinds.corruption import CorruptedText, Noise, SpanCorruptionTask, _partition
from tests.tasks.conftest import Write

TEXTS = [" the cat sat on a mat", "", "a dog ran and the dog sat", "  \n", "the mat", "and a cat and a dog and a mat"]


def _sentinels(tokenizer: PreTrainedTokenizerFast, count: int) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]", eos_token="[SEP]", pad_token="[PAD]"
    )
    made.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(count)]})
    return made


@pytest.fixture
def filling(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return _sentinels(tokenizer, 8)


@pytest.fixture
def folder(tmp_path: Path, write: Write) -> Path:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.parquet", {"text": TEXTS})
    return tmp_path


def _task(folder: Path, *, seed: int = 0, **settings: object) -> SpanCorruptionTask:
    config = TaskConfig(name="span_corruption", **{"max_length": 9, "noise_density": 0.3, **settings})
    task = build_task(config, DataConfig(path=str(folder)), seed=seed)
    assert isinstance(task, SpanCorruptionTask)
    return task


def _load(folder: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, **settings: object) -> CorruptedText:
    data = _task(folder, seed=seed, **settings).load(tokenizer).evals["validation"]
    assert isinstance(data, CorruptedText)
    return data


def _restored(source: list[int], target: list[int], sentinels: list[int]) -> list[int]:
    """The window that an input and its target came from."""
    spans: dict[int, list[int]] = {}
    for token in target:
        if token in sentinels:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    return [token for place in source for token in (spans[place] if place in spans else [place])]


@pytest.mark.parametrize("settings", [{}, {"max_length": 20, "mean_span": 1.0}, {"noise_density": 0.6}])
def test_what_is_dropped_can_be_put_back(
    folder: Path, filling: PreTrainedTokenizerFast, settings: dict[str, float]
) -> None:
    data = _load(folder, filling, **settings)
    end, sentinels = filling.eos_token_id, filling.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(8)])
    documents = [filling(text, add_special_tokens=False)["input_ids"] for text in TEXTS if text.strip()]
    stream = [token for document in documents for token in (*document, end)]
    found: list[int] = []
    for i in range(len(data)):
        source, target = data.pair(i)
        assert (len(source), len(target)) == (int(data.lengths[i]), int(data.targets[i]))
        assert source[-1] == target[-1] == end
        used = [token for token in target if token in sentinels]
        assert used == sentinels[: len(used)]
        assert [token for token in source if token in sentinels] == used[:-1]
        assert target[-2] == used[-1]
        assert source[0] not in sentinels
        found += _restored(source[:-1], target[:-2], sentinels)
    assert found == stream[: len(found)]
    assert len(stream) - len(found) <= 1


def test_a_last_token_alone_is_left_out(folder: Path, filling: PreTrainedTokenizerFast) -> None:
    # 28 tokens in windows of 9 leave one, of which nothing could be dropped.
    assert Noise(0.3, 3.0).window(8) == 9
    data = _load(folder, filling, max_length=8)
    assert data.lengths.tolist() == [8, 8, 8]


def test_windows_are_as_long_as_the_papers() -> None:
    noise = Noise(0.15, 3.0)
    assert noise.window(512) == 568
    assert noise.counts(568) == (85, 28)
    assert noise.sizes(568) == (512, 115)  # the authors' 114, and the last sentinel


@pytest.mark.parametrize("max_length", [8, 31, 128, 512])
@pytest.mark.parametrize("noise", [Noise(0.15, 3.0), Noise(0.5, 10.0), Noise(0.9, 1.0)])
def test_no_longer_window_would_fit(max_length: int, noise: Noise) -> None:
    length = noise.window(max_length)
    assert noise.sizes(length)[0] <= max_length < noise.sizes(length + 1)[0]


def test_every_division_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    seen = Counter(tuple(_partition(5, 3, rng).tolist()) for _ in range(6000))
    assert set(seen) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(abs(count - 1000) < 5 * math.sqrt(1000) for count in seen.values())


def test_noise_is_a_function_of_seed_epoch_and_place(folder: Path, filling: PreTrainedTokenizerFast) -> None:
    data = _load(folder, filling, max_length=16, mean_span=1.0)
    again = _load(folder, filling, max_length=16, mean_span=1.0)
    later, other = data.in_epoch(1), _load(folder, filling, max_length=16, mean_span=1.0, seed=1)
    every = range(len(data))
    pairs = [data.pair(i) for i in every]
    assert pairs == [again.pair(i) for i in reversed(every)][::-1]
    assert pairs == [later.in_epoch(0).pair(i) for i in every]
    assert pairs != [later.pair(i) for i in every]
    assert pairs != [other.pair(i) for i in every]
    assert torch.equal(later.lengths, data.lengths)
    assert [len(later.pair(i)[1]) for i in every] == data.targets.tolist()


def test_batches_are_padded_rows(folder: Path, filling: PreTrainedTokenizerFast) -> None:
    data = _load(folder, filling)
    last = len(data) - 1
    batch = data.collate([last, 0], pad_multiple=4)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 12)
    for row, index in enumerate((last, 0)):
        source, target = data.pair(index)
        assert batch["input_ids"][row].tolist() == source + [filling.pad_token_id] * (12 - len(source))
        assert batch["attention_mask"][row].tolist() == [1] * len(source) + [0] * (12 - len(source))
        assert [token for token in batch["labels"][row].tolist() if token != -100] == target


def _model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.pad_token_id}
    return T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_perplexity_is_that_of_all_logits(folder: Path, filling: PreTrainedTokenizerFast, batch: int) -> None:
    model, task, data = _model(filling), _task(folder, logits_chunk=3), _load(folder, filling)
    head, total, found = VocabularyHead(model.get_output_embeddings()), 0.0, []
    with torch.no_grad():
        for i in range(len(data)):
            example = data.collate([i])
            logits = model(**example).logits
            total += F.cross_entropy(logits[0], example["labels"][0], reduction="sum").item()
        for start in range(0, len(data), batch):
            inputs = data.collate(range(start, min(start + batch, len(data))))
            found.append(task.predict(model, head, inputs, inputs.pop("labels")))
    scores = task.score(torch.cat(found), data)
    assert scores["loss"] == pytest.approx(total / int(data.targets.sum()), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert task.merit(scores) == -scores["perplexity"]
    with pytest.raises(NumericsError, match="not finite"):
        task.score(torch.full((len(data), 1), math.nan), data)


def test_too_few_sentinels_are_told(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    message = r"drops up to 2 spans of a window of 9 tokens and needs 3 sentinels: the tokenizer of '' has 2 of"
    with pytest.raises(ArchitectureError, match=message):
        _load(folder, _sentinels(tokenizer, 2), mean_span=1.5)
    assert len(_load(folder, _sentinels(tokenizer, 3), mean_span=1.5)) > 0


def test_sentinels_that_the_model_has_not_are_told(folder: Path, filling: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ArchitectureError, match="they do not belong together"):
        _task(folder).load(filling, vocab_size=len(filling) - 8)


def test_a_tokenizer_without_an_end_of_text_is_refused(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    open_ended = _sentinels(tokenizer, 8)
    open_ended.eos_token = None
    with pytest.raises(ArchitectureError, match="no end-of-sequence token"):
        _load(folder, open_ended)


def test_other_mistakes_are_told(folder: Path, tmp_path: Path, write: Write, filling: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"task\.metric = 'rougeL'"):
        _task(folder, metric="rougeL")
    with pytest.raises(DataError, match="no column 'words' of task 'span_corruption'"):
        _task(folder, text_column="words").load(filling)
    for split in ("train", "validation"):
        write(tmp_path / "blank" / f"{split}.parquet", {"text": ["", " "]})
    with pytest.raises(DataError, match="holds no text, only blank rows"):
        _task(tmp_path / "blank").load(filling)
