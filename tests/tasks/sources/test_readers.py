from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError, DataError
from dsprune.tasks import build_task
from dsprune.tasks.sources.readers import HubData, SplitReader, eval_splits, read_files
from dsprune.tasks.sources.splits import Split, hold_out
from tests.tasks.conftest import Write

COLUMNS = {"sentence": ["the cat", "12", "null"], "label": [0, 1, 1]}
OFFICIAL = {"validation": "validation"}


def reader(folder: Path, evals: dict[str, str] = OFFICIAL, **data: Any) -> SplitReader:
    columns = ("sentence", "label")
    return SplitReader("sst2", DataConfig(path=str(folder), **data), HubData(""), evals, columns, columns)


def numbered(count: int) -> dict[str, list[Any]]:
    return {"sentence": [f"number {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}


# --- files --------------------------------------------------------------------------------


def test_a_file_is_a_split(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "train.csv", COLUMNS)
    split = read_files([path], "train", text_columns=("sentence",))
    assert {name: list(values) for name, values in split.columns.items()} == COLUMNS
    assert (split.name, split.origin, split.notes, len(split)) == ("train", str(path), (), 3)


def test_shards_are_joined_in_order(tmp_path: Path, write: Write) -> None:
    for i in (1, 0, 2):
        write(tmp_path / f"train-0000{i}-of-00003.parquet", {"label": [i], "sentence": [f"shard {i}"]})
    write(tmp_path / "validation.parquet", COLUMNS)
    split = reader(tmp_path)(False).train
    assert (split.name, split.notes) == ("train", ())
    assert split.origin == f"{tmp_path}/train-00000-of-00003.parquet and 2 more"
    assert split.columns == {"label": [0, 1, 2], "sentence": ["shard 0", "shard 1", "shard 2"]}
    odd = write(tmp_path / "train-00002-of-00003.parquet", {"label": [2], "text": ["b"]})
    with pytest.raises(
        DataError, match=rf"{odd}: has columns label, text, and train-00000-of-00003.parquet label, sent"
    ):
        reader(tmp_path)(False)


def test_a_partial_file_keeps_its_name(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "validation_heldout_partial.parquet", COLUMNS)
    split = read_files([path], "validation", text_columns=("sentence",))
    assert split.name == "validation_heldout_partial"
    assert split.notes == (
        "validation_heldout_partial: validation_heldout_partial.parquet is not the official validation split",
    )


def test_a_split_under_another_name_is_the_split(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.csv", COLUMNS)
    write(tmp_path / "dev.csv", COLUMNS)
    splits = reader(tmp_path)(False)
    assert [(split.name, split.notes) for split in splits] == [("train", ()), ("validation", ())]
    assert list(splits.evals) == ["validation"]


def test_first_examples_say_so() -> None:
    split = Split("train", "here", {"sentence": ["a", "b", "c"]})
    assert split.first(None) is split
    assert split.first(3) is split
    assert split.first(2).columns == {"sentence": ["a", "b"]}
    assert split.first(2).notes == ("train: the first 2 of 3 examples",)


def test_training_examples_are_kept_until_all_are_read(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.csv", COLUMNS)
    write(tmp_path / "dev.csv", COLUMNS)
    read = reader(tmp_path, max_train_examples=1)
    early = read.training()
    assert len(early) == 3
    assert read.training() is early
    write(tmp_path / "train.csv", numbered(5))
    assert read(False).train.columns == {"sentence": ["the cat"], "label": ["0"]}
    assert read(False).train.columns == {"sentence": ["number 0"], "label": ["0"]}


# --- columns ------------------------------------------------------------------------------


def test_columns_are_renamed(tmp_path: Path, write: Write) -> None:
    rows = {"text": ["007", "b"], "sentence": ["not", "this"], "gold": [1, 0]}
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.csv", rows)
    for split in reader(tmp_path, columns={"sentence": "text", "label": "gold"})(False):
        assert split.columns == {"sentence": ["007", "b"], "label": ["1", "0"]}
        assert split.renamed == {"sentence": "text", "label": "gold"}


def test_columns_may_change_places(tmp_path: Path, write: Write) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", {"sentence": [1], "label": ["a"]})
    train = reader(tmp_path, columns={"sentence": "label", "label": "sentence"})(False).train
    assert train.columns == {"sentence": ["a"], "label": [1]}


def test_a_renamed_column_is_called_what_the_user_calls_it(
    tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", {"text": ["a", None], "gold": [1, 0]})
    data = DataConfig(path=str(tmp_path), columns={"sentence": "text", "label": "gold"})
    with pytest.raises(DataError, match=r"train.jsonl: row 1 \(from 0\), column 'text': expected text, found None$"):
        build_task(TaskConfig(name="sst2"), data, seed=0).load(tokenizer)


ANSWERS = {"text": ["b"], "answer_start": [2]}


@pytest.mark.parametrize(
    ("task", "columns", "rows"),
    [
        ("mrpc", {"sentence1": "a", "sentence2": "b"}, {"a": ["x"], "b": ["y"], "label": [1]}),
        ("squad", {"context": "c", "question": "q"}, {"id": ["0"], "c": ["a b"], "q": ["x"], "answers": [ANSWERS]}),
        ("conll2003", {"tokens": "words", "ner_tags": "tags"}, {"words": [["a"]], "tags": [["O"]]}),
        ("lm", {"text": "body"}, {"body": ["a b c"]}),
        ("seq2seq", {"source": "en", "target": "de"}, {"en": ["a"], "de": ["b"]}),
        ("span_corruption", {"text": "body"}, {"body": ["a b c"]}),
        ("text_classification", {"text": "t", "label": "l"}, {"t": ["a", "b"], "l": ["x", "y"]}),
        ("token_classification", {"tokens": "w", "tags": "t"}, {"w": [["a", "b"]], "t": [["X", "Y"]]}),
    ],
)
def test_every_task_reads_renamed_columns(
    tmp_path: Path, write: Write, task: str, columns: dict[str, str], rows: dict[str, list[Any]]
) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    built = build_task(TaskConfig(name=task, max_length=200), DataConfig(path=str(tmp_path), columns=columns), seed=0)
    splits = built._check(built.read(False))
    assert set(columns) <= set(splits.train.columns)


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("sst2", {"sentense": "text"}, r"data.columns.sentense: task 'sst2' reads no .*; did you mean 'sentence'\?$"),
        ("squad", {"answer": "x"}, r"data.columns.answer: task 'squad' .*; did you mean 'answers'\?$"),
        ("lm", {"words": "x"}, r"data.columns.words: task 'lm' reads no column 'words'; it reads text$"),
        ("mrpc", {"sentence1": "a", "sentence2": "a"}, r"data.columns: column 'a' is named twice"),
        ("order", {"premise": "a"}, r"data.columns: task 'order' is generated and reads no data"),
    ],
)
def test_columns_that_no_task_reads(task: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(name=task, max_length=200), DataConfig(columns=columns), seed=0)


def test_a_column_that_is_not_there(tmp_path: Path, write: Write) -> None:
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.csv", COLUMNS)
    with pytest.raises(DataError, match=r"no column 'text' \(data.columns.sentence\); there is sentence, label$"):
        reader(tmp_path, columns={"sentence": "text"})(False)


# --- examples that are held out -----------------------------------------------------------


def test_held_out_examples_are_not_trained_on(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.csv", numbered(50))
    splits = reader(tmp_path, validation_share=0.1)(False)
    assert list(splits.evals) == ["heldout"]
    held = splits.evals["heldout"]
    assert (len(splits.train), len(held)) == (45, 5)
    assert held.notes == ("heldout: 5 of the 50 examples of train, not trained on",)
    assert sorted([*splits.train.columns["sentence"], *held.columns["sentence"]]) == sorted(numbered(50)["sentence"])
    again = reader(tmp_path, validation_share=0.1)(False).evals["heldout"]
    assert again.columns == held.columns


def test_other_splits_stay(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.csv", numbered(20))
    write(tmp_path / "test.csv", COLUMNS)
    evals = {"validation": "validation", "test": "test"}
    splits = reader(tmp_path, evals, validation_share=0.25, max_eval_examples=2, max_train_examples=3)(False)
    assert {name: len(split) for name, split in splits.evals.items()} == {"heldout": 2, "test": 2}
    assert len(splits.train) == 3
    assert splits.train.notes == ("train: the first 3 of 15 examples",)


def test_what_is_held_out_depends_on_the_number_of_examples_alone() -> None:
    """Written down: another choice would compare old runs with new ones on other examples."""
    _, held = hold_out(Split("train", "here", numbered(10)), 0.3)
    assert held.columns["sentence"] == ["number 2", "number 4", "number 6"]


@pytest.mark.parametrize(
    ("task", "files", "data", "message"),
    [
        ("sst2", ["train", "val"], {}, r"data.validation_share = 0.5: .*val.csv is there already: drop one"),
        ("mnli", ["train"], {}, r"task 'mnli' is evaluated on validation_matched, validation_mismatched, and not on"),
        ("lm", ["train"], {"evals": ("other",)}, r"data.validation_share: task 'lm' is evaluated on other"),
        ("order", ["train"], {}, r"data.(path|validation_share): task 'order' is generated"),
    ],
)
def test_examples_that_cannot_be_held_out(
    tmp_path: Path, write: Write, task: str, files: list[str], data: dict[str, Any], message: str
) -> None:
    for name in files:
        write(tmp_path / f"{name}.csv", COLUMNS)
    with pytest.raises(ConfigError, match=message):
        build_task(TaskConfig(name=task), DataConfig(path=str(tmp_path), validation_share=0.5, **data), seed=0)


def test_nothing_left_to_train_on(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.csv", numbered(1))
    with pytest.raises(DataError, match=r"data.validation_share = 0.5 of 1 examples leaves none to train on"):
        reader(tmp_path, validation_share=0.5)(False)


# --- the hub ------------------------------------------------------------------------------


def test_classes_go_by_name_where_the_data_set_numbers_them_otherwise(
    monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Labels 0 of this data set are positive, and 1 of the task: numbers alone would turn every label round."""
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["positive", "negative"])}
    )
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    task = build_task(TaskConfig(name="sst2"), DataConfig(), seed=0)
    assert task.load(tokenizer).train.labels.tolist() == [1, 0, 0]


def test_evaluation_splits_are_named_once_and_one_beside_test() -> None:
    assert eval_splits(DataConfig(evals=("dev", "test"))) == {"dev": "dev", "test": "test"}
    for evals in (("test",), ("a", "a")):
        with pytest.raises(ConfigError, match="name each split once, and one beside 'test'"):
            eval_splits(DataConfig(evals=evals))
