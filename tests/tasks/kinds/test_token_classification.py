from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.engine.models.load import label_config
from dsprune.errors import ConfigError, DataError, NumericsError
from dsprune.tasks import build_task
from dsprune.tasks.kinds.token_classification import WordTask, are_iob
from dsprune.tasks.kinds.tokens import TaggedWords, TokenTask
from dsprune.tasks.losses import IGNORED
from tests.tasks.conftest import Write

Columns = dict[str, list[Any]]

IOB: Columns = {
    "tokens": [["anna", "met", "bob"], ["oslo"]],
    "tags": [["B-PER", "O", "B-PER"], ["B-LOC"]],
}
PARTS: Columns = {
    "tokens": [["the", "cat", "sat"], ["a", "dog"]],
    "tags": [["DET", "NOUN", "VERB"], ["DET", "NOUN"]],
}


def build(
    folder: Path, write: Write, columns: Columns, *, suffix: str = "jsonl", data: Any = None, **task: Any
) -> TokenTask:
    for split in ("train", "validation"):
        write(folder / f"{split}.{suffix}", columns)
    settings = DataConfig(path=str(folder), **(data or {}))
    built = build_task(TaskConfig(**{"name": "token_classification", "max_length": 64, **task}), settings, seed=0)
    assert isinstance(built, TokenTask)
    return built


def certain(split: TaggedWords, num_labels: int, width: int = 64) -> Tensor:
    """Outputs that give every label."""
    labels = split.collate(range(len(split)))["labels"]
    classes = torch.zeros((len(split), width), dtype=torch.int64)
    classes[:, : labels.shape[1]] = torch.where(labels == IGNORED, 0, labels)
    return torch.nn.functional.one_hot(classes, num_labels).float()


def test_tags_are_found_and_entities_are_scored(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, IOB)
    assert (task.labels, task.primary) == (("B-LOC", "B-PER", "O"), "f1")
    split = task.load(speller).train
    assert isinstance(split, TaggedWords)
    assert split.tags.tolist() == [1, 2, 1, 0]
    outputs = certain(split, 3)
    assert task.score(outputs, split) | {"f1": 1.0, "precision": 1.0, "recall": 1.0} == task.score(outputs, split)
    assert label_config(task)["id2label"] == {0: "B-LOC", 1: "B-PER", 2: "O"}


def test_other_tags_are_scored_by_words(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, PARTS)
    assert isinstance(task, WordTask)
    assert (task.labels, task.metrics) == (("DET", "NOUN", "VERB"), ("accuracy", "macro_f1"))
    split = task.load(speller).train
    assert isinstance(split, TaggedWords)
    outputs = certain(split, 3)
    assert task.score(outputs, split) == {"accuracy": 1.0, "macro_f1": 1.0}
    # The verb is taken for a noun: F1 is 1, 4/5 and 0.
    place = (split.collate([0])["labels"][0] == 2).nonzero().item()
    outputs[0, int(place)] = torch.tensor([0.0, 9.0, 0.0])
    assert task.score(outputs, split) == {
        "accuracy": pytest.approx(4 / 5),
        "macro_f1": pytest.approx((1 + 4 / 5 + 0) / 3),
    }
    outputs[0, 0, 0] = torch.nan
    with pytest.raises(NumericsError, match="1 of 2 examples"):
        task.score(outputs, split)


def test_words_that_are_cut_count_as_wrong(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, PARTS, max_length=8)  # [CLS] the cat [SEP]
    split = task.load(speller).train
    assert isinstance(split, TaggedWords)
    assert split.targets.tolist() == [2, 2]
    assert split.notes == ("train: 1 of 2 sentences are cut at 8 tokens, and words beyond count as wrong",)
    scores = task.score(certain(split, 3, width=8), split)
    assert scores == {"accuracy": pytest.approx(4 / 5), "macro_f1": pytest.approx(2 / 3)}


def test_entities_may_be_scored_by_words(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    """Then nothing is asked of what tag follows another."""
    loose = {"tokens": [["a", "b"], ["c"]], "tags": [["I-X", "O"], ["B-X"]]}
    task = build(tmp_path, write, loose, metric="macro_f1")
    assert (task.primary, isinstance(task, WordTask)) == ("macro_f1", True)
    task.load(speller)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_words_and_tags_between_spaces(
    tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast, suffix: str
) -> None:
    spaced = {name: [" ".join(row) for row in rows] for name, rows in PARTS.items()}
    one, other = (
        build(tmp_path / kind, write, columns, suffix=kind).load(speller).train
        for kind, columns in ((suffix, spaced), ("jsonl", PARTS))
    )
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.collate([0, 1])["input_ids"], other.collate([0, 1])["input_ids"])


def test_tags_that_are_numbers_go_by_name(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, {"tokens": [["a", "b", "c"]], "tags": [[5, 0, 2]]})
    assert task.labels == ("0", "2", "5")
    split = task.load(speller).train
    assert isinstance(split, TaggedWords)
    assert split.tags.tolist() == [2, 0, 1]
    named = build(tmp_path / "named", write, {"tokens": [["a", "b"]], "tags": [[1, 0]]}, labels=("O", "B-X"))
    split = named.load(speller).train
    assert isinstance(split, TaggedWords)
    assert (named.primary, split.tags.tolist()) == ("f1", [1, 0])


def test_hundreds_of_tags(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    tags = [f"TAG{i:03d}" for i in range(300)]
    columns = {"tokens": [["a"] for _ in tags], "tags": [[tag] for tag in tags]}
    task = build(tmp_path, write, columns)
    split = task.load(speller).train
    assert isinstance(split, TaggedWords)
    assert split.tags.tolist() == list(range(300))
    assert split.collate([299])["labels"].tolist() == [[IGNORED, 299, IGNORED]]
    assert task.score(certain(split, 300, width=3), split)["accuracy"] == 1.0


def test_what_iob_tags_look_like() -> None:
    assert are_iob(["O", "B-PER", "I-PER"])
    assert not are_iob(["B-PER", "I-PER"])
    assert not are_iob(["O", "B-PER", "S-PER"])
    assert not are_iob(["O", "B-"])
    assert not are_iob(["DET", "NOUN"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"words": [["a"]], "tags": [["X"]]},
            r"no column 'tokens' of task 'token_classification'; there is words, tags",
        ),
        ({"tokens": [["a"]], "ner": [["X"]]}, r"no column 'tags' of task .*data.columns = \{tags = "),
        ({"tokens": [["a"], ["b"]], "tags": [["X"], None]}, r"row 1 .*'tags': expected a list of tags, .*found None$"),
        ({"tokens": [["a"], ["b"]], "tags": [["X"], [None]]}, r"row 1 .*found \[None\]$"),
        ({"tokens": [["a"], ["b"]], "tags": [["X"], ["X"]]}, r"column 'tags' holds one tag alone, X$"),
        ({"tokens": [["a"], ["b"]], "tags": [["X"], ["x"]]}, r"labels 'X' and 'x' differ in case"),
    ],
)
def test_training_examples_that_cannot_be(tmp_path: Path, write: Write, columns: Columns, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(tmp_path, write, columns)


def test_tags_that_are_not_known(tmp_path: Path, write: Write, speller: PreTrainedTokenizerFast) -> None:
    task = build(tmp_path, write, PARTS)
    write(tmp_path / "validation.jsonl", {"tokens": [["a"], ["b"]], "tags": [["DET"], ["ADJ"]]})
    wanted = (
        r"validation.jsonl: row 1 \(from 0\), column 'tags': for each word expected one of DET, NOUN, VERB, or a "
        r"number from 0 to 2, found \['ADJ'\]; the column holds ADJ, DET$"
    )
    with pytest.raises(DataError, match=wanted):
        task.load(speller)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({}, "task 'token_classification' has no data set of its own"),
        ({"labels": ("O", "O")}, "task.labels: 'O' is named twice"),
        ({"problem": "regression"}, "task.problem: for task text_classification only"),
        ({"multi_label": True}, "task.multi_label: for task text_classification only"),
    ],
)
def test_settings_that_cannot_be(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(**{"name": "token_classification", **task}), DataConfig(), seed=0)


def test_metrics_by_choice(tmp_path: Path, write: Write) -> None:
    assert build(tmp_path, write, IOB, metric="recall").primary == "recall"
    with pytest.raises(ConfigError, match=r"task.metric = 'f1': task 'token_classification' has no such metric"):
        build(tmp_path, write, PARTS, metric="f1")
