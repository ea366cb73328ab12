from __future__ import annotations

from pathlib import Path

import pytest

from dsprune.errors import DataError
from dsprune.tasks.sources.folders import find_files, holds, is_official
from tests.tasks.conftest import Write

COLUMNS = {"sentence": ["a"], "label": [0]}
SPLITS = ("train", "validation")


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


@pytest.mark.parametrize("place", [".", "sst2", "data", "sst2/data"])
def test_files_stand_in_the_folder_in_that_of_the_task_or_in_data(tmp_path: Path, place: str) -> None:
    train, validation = touch(tmp_path / place, "train.parquet", "validation.csv")
    assert find_files(tmp_path, "sst2", SPLITS) == {"train": (train,), "validation": (validation,)}


@pytest.mark.parametrize("name", ["validation", "dev", "valid", "val", "eval"])
def test_what_a_validation_split_is_called(tmp_path: Path, name: str) -> None:
    train, validation = touch(tmp_path, "train.csv", f"{name}.csv.gz")
    found = find_files(tmp_path, "sst2", SPLITS)
    assert found == {"train": (train,), "validation": (validation,)}
    assert is_official(found["validation"], "validation")
    assert not is_official(found["train"], "validation")


def test_both_validation_splits_of_mnli_have_other_names(tmp_path: Path) -> None:
    matched, mismatched = touch(tmp_path, "dev_matched.tsv", "dev_mismatched.tsv")
    splits = ("validation_matched", "validation_mismatched")
    assert list(find_files(tmp_path, "mnli", splits).values()) == [(matched,), (mismatched,)]


def test_the_official_name_comes_first(tmp_path: Path) -> None:
    _, official, _ = touch(tmp_path, "train.csv", "validation.csv", "dev.csv")
    assert find_files(tmp_path, "sst2", SPLITS)["validation"] == (official,)


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-00000-of-00002-a09b74b3ef9c3b56.parquet", "train-00001-of-00002-b19b74b3ef9c3b56.parquet"],
        ["train-00000-of-00001.jsonl"],
        ["train/0000.parquet", "train/0001.parquet"],
    ],
)
def test_shards_as_the_hub_names_them(tmp_path: Path, names: list[str]) -> None:
    shards = touch(tmp_path / "sst2", *names)
    touch(tmp_path / "sst2", "validation-00000-of-00001.parquet", "test-00000-of-00003.parquet", "README.md")
    found = find_files(tmp_path, "sst2", SPLITS)
    assert found["train"] == tuple(shards)
    assert is_official(found["train"], "train")
    assert is_official(found["validation"], "validation")


def test_a_partial_file_counts_only_without_the_official_one(tmp_path: Path) -> None:
    partial, heldout, _ = touch(
        tmp_path, "train_partial.parquet", "validation_heldout_partial.parquet", "validation_other.parquet"
    )
    assert find_files(tmp_path, "qqp", SPLITS) == {"train": (partial,), "validation": (heldout,)}
    assert not is_official((heldout,), "validation")
    (official,) = touch(tmp_path, "train.jsonl")
    assert find_files(tmp_path, "qqp", SPLITS) == {"train": (official,), "validation": (heldout,)}


def test_a_split_that_may_be_there(tmp_path: Path) -> None:
    assert holds(tmp_path, "sst2", "validation") is None
    (there,) = touch(tmp_path / "data", "dev.csv")
    assert holds(tmp_path, "sst2", "validation") == there


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"neither it nor its subfolder 'sst2' holds train, validation .*; there is nothing$"),
        (["mrpc/train.csv"], r"subfolder 'sst2' holds .* there is mrpc/ \(with train.csv\)$"),
        (["a/1", "a/2", "a/3", "a/4", "a/5", "a/6"], r"there is a/ \(with 1, 2, 3, 4 and 2 more\)$"),
        (["train.txt", "data.csv"], r"there is data.csv, train.txt$"),
        (
            ["train.csv", "test.csv"],
            r"no file for split 'validation' .* there is test.csv, train.csv: give one of that name \(or dev, valid, "
            r"val, eval\), or hold out a part of the training examples, data.validation_share = 0.1$",
        ),
        (["validation.csv"], r"no file for split 'train' .* there is validation.csv$"),
        (["sst2/validation.csv"], r"sst2': no file for split 'train' .* there is validation.csv$"),
        (["train.csv", "train.jsonl", "dev.csv"], r"train.csv and train.jsonl both stand for split 'train': keep one"),
        (["train.csv", "dev.csv", "val.csv"], r"dev.csv and val.csv both stand for split 'validation': keep one"),
        (["train.csv", "train-00000-of-00001.csv", "dev.csv"], r"both stand for split 'train'"),
        (
            ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet", "dev.csv"],
            r"shard 00001-of-00003 is missing, beside train-00000-of-00003.parquet: 2 of at least 3 are there",
        ),
        (["train-00001-of-00002.parquet", "dev.csv"], r"shard 00000-of-00002 is missing"),
        (
            ["train-00000-of-00001-a09b74b3ef9c3b56.csv", "train-00000-of-00001-b19b74b3ef9c3b56.csv", "dev.csv"],
            r"shard 00000-of-00001 is there twice: keep one",
        ),
        (["train/0001.parquet", "dev.csv"], r"train: shard 0000 is missing, beside 0001.parquet"),
    ],
)
def test_folders_that_cannot_be(tmp_path: Path, names: list[str], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message) as caught:
        find_files(tmp_path, "sst2", SPLITS)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path, write: Write) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        find_files(tmp_path / "nowhere", "sst2", SPLITS)
    with pytest.raises(DataError, match="is not a folder"):
        find_files(write(tmp_path / "train.csv", COLUMNS), "sst2", SPLITS)
