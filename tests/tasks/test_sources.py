from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsprune.errors import DataError
from dsprune.tasks.sources import Split, find_files, read_file
from tests.tasks.conftest import Write

COLUMNS = {"sentence": ["the cat", "12", "null"], "label": [0, 1, 1]}
SPLITS = ("train", "validation")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, write: Write, suffix: str) -> None:
    path = write(tmp_path / f"train.{suffix}", COLUMNS)
    split = read_file(path, "train", text_columns=("sentence",))
    assert {name: list(values) for name, values in split.columns.items()} == COLUMNS
    assert (split.name, split.origin, split.notes, len(split)) == ("train", str(path), (), 3)


def test_json_may_be_one_list(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"sentence": "a", "label": 1}]), encoding="utf-8")
    assert read_file(path, "train", text_columns=()).columns == {"sentence": ["a"], "label": [1]}


def test_csv_is_quoted_and_tsv_is_not(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('sentence,label\n"a, b\nc",1\n', encoding="utf-8")
    assert read_file(tmp_path / "train.csv", "train", text_columns=("sentence",)).columns["sentence"] == ["a, b\nc"]
    (tmp_path / "train.tsv").write_text('sentence\tlabel\n"a lone quote\t1\nb\t0\n', encoding="utf-8")
    split = read_file(tmp_path / "train.tsv", "train", text_columns=("sentence",))
    assert split.columns["sentence"] == ['"a lone quote', "b"]


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_text_that_looks_like_numbers_stays_text(tmp_path: Path, suffix: str, separator: str) -> None:
    path = tmp_path / f"train.{suffix}"
    path.write_text(f"sentence{separator}label\n007{separator}1\n{separator}0\n", encoding="utf-8")
    split = read_file(path, "train", text_columns=("sentence",))
    assert split.columns == {"sentence": ["007", ""], "label": [1, 0]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", b"PAR1 this is not parquet", "cannot read .*train.parquet"),
        ("train.csv", b"sentence,label\na,1\nb\n", "cannot read .*train.csv: .*Expected 2 columns, got 1"),
        ("train.csv", b"", "cannot read .*train.csv"),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "b"\n', "cannot read .*train.jsonl: line 2:"),
        (
            "train.jsonl",
            b'{"sentence": "a", "label": 1}\n{"sentence": "b"}\n',
            "row 1: has columns sentence, the first",
        ),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n7\n', "row 1: expected an object, found int"),
        ("train.json", b'[{"sentence": "a"', "cannot read .*train.json"),
        ("train.jsonl", b'{"sentence": "\xff"}\n', "cannot read .*train.jsonl: .*utf-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_file(tmp_path / name, "train", text_columns=("sentence",))
    assert "\n" not in str(caught.value)


def test_files_stand_in_the_folder_or_in_that_of_the_task(tmp_path: Path, write: Write) -> None:
    train = write(tmp_path / "sst2" / "train.parquet", COLUMNS)
    validation = write(tmp_path / "sst2" / "validation.csv", COLUMNS)
    wanted = {"train": train, "validation": validation}
    assert find_files(tmp_path, "sst2", SPLITS) == wanted
    assert find_files(tmp_path / "sst2", "sst2", SPLITS) == wanted


def test_a_partial_file_counts_only_without_the_official_one(tmp_path: Path, write: Write) -> None:
    partial = write(tmp_path / "train_partial.parquet", COLUMNS)
    heldout = write(tmp_path / "validation_heldout_partial.parquet", COLUMNS)
    write(tmp_path / "validation_other.parquet", COLUMNS)
    assert find_files(tmp_path, "qqp", SPLITS) == {"train": partial, "validation": heldout}
    official = write(tmp_path / "train.jsonl", COLUMNS)
    assert find_files(tmp_path, "qqp", SPLITS) == {"train": official, "validation": heldout}


def test_a_partial_file_keeps_its_name(tmp_path: Path, write: Write) -> None:
    path = write(tmp_path / "validation_heldout_partial.parquet", COLUMNS)
    split = read_file(path, "validation", text_columns=("sentence",))
    assert split.name == "validation_heldout_partial"
    assert split.notes == (
        "validation_heldout_partial: validation_heldout_partial.parquet is not the official validation split",
    )


def test_a_missing_split_lists_what_is_there(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.parquet", COLUMNS)
    write(tmp_path / "dev.parquet", COLUMNS)
    with pytest.raises(DataError, match=r"no file for split 'validation' .* there is dev.parquet, train.parquet$"):
        find_files(tmp_path, "sst2", SPLITS)


def test_a_folder_without_data_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mrpc").mkdir()
    with pytest.raises(DataError, match=r"its subfolder 'sst2' holds train, validation .* there is mrpc/$"):
        find_files(tmp_path, "sst2", SPLITS)


def test_two_files_for_one_split_are_refused(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train.parquet", COLUMNS)
    write(tmp_path / "train.csv", COLUMNS)
    write(tmp_path / "validation.csv", COLUMNS)
    with pytest.raises(DataError, match=r"train.csv and train.parquet both stand for split 'train'"):
        find_files(tmp_path, "sst2", SPLITS)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        find_files(tmp_path / "nowhere", "sst2", SPLITS)


def test_first_examples_say_so() -> None:
    split = Split("train", "here", {"sentence": ["a", "b", "c"]})
    assert split.first(None) is split
    assert split.first(3) is split
    assert split.first(2).columns == {"sentence": ["a", "b"]}
    assert split.first(2).notes == ("train: the first 2 of 3 examples",)
