from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsprune.errors import DataError
from dsprune.tasks.sources.file_formats import Table, class_names, kind_of, read_table
from tests.tasks.conftest import Write

COLUMNS = {"sentence": ["the cat", "12", "null"], "label": [0, 1, 1]}


def read(path: Path, content: str | bytes | None = None, *, text: tuple[str, ...] = ("sentence",)) -> Table:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, "train", text_columns=text)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, write: Write, suffix: str) -> None:
    assert read(write(tmp_path / f"train.{suffix}", COLUMNS)).columns == COLUMNS


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress)])
def test_packed_files(tmp_path: Path, write: Write, suffix: str, ending: str, pack: Any) -> None:
    plain = write(tmp_path / f"train.{suffix.replace('json', 'jsonl').replace('ll', 'l')}", COLUMNS)
    path = tmp_path / f"train.{suffix}.{ending}"
    assert read(path, pack(plain.read_bytes())).columns == COLUMNS
    assert kind_of(path) == ("train", f".{suffix}")


def test_other_endings_have_no_reader() -> None:
    assert [kind_of(Path(name))[1] for name in ("train.txt", "train.parquet.gz", "README.md", "train.arrow")] == [
        ""
    ] * 4


# --- csv and tsv --------------------------------------------------------------------------


def test_csv_is_quoted_and_tsv_is_not(tmp_path: Path) -> None:
    assert read(tmp_path / "train.csv", 'sentence,label\n"a, b\nc",1\n').columns["sentence"] == ["a, b\nc"]
    got = read(tmp_path / "train.tsv", 'sentence\tlabel\n"a lone quote\t1\n"""\t0\n')
    assert (got.columns["sentence"], got.notes) == (['"a lone quote', '"""'], ())


def test_a_tsv_with_quoted_cells_is_told_of(tmp_path: Path) -> None:
    content = 'sentence\tlabel\na\t0\n"he said ""no"""\t1\n'
    got = read(tmp_path / "train.tsv", content)
    assert got.columns["sentence"][1] == '"he said ""no"""'
    (note,) = got.notes
    assert note.startswith("train.tsv: 1 cells of column 'sentence' look quoted (the first in row 1, from 0)")
    assert read(tmp_path / "train.csv", content).columns["sentence"] == ["a", 'he said "no"']


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_text_that_looks_like_numbers_stays_text(tmp_path: Path, suffix: str, separator: str) -> None:
    content = f"sentence{separator}label\n007{separator}1\n{separator}0\n"
    assert read(tmp_path / f"train.{suffix}", content).columns == {"sentence": ["007", ""], "label": [1, 0]}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_the_delimiter_is_the_one_of_the_header(tmp_path: Path, suffix: str, delimiter: str) -> None:
    quoted = "one, two" if suffix == "tsv" and delimiter == "\t" else '"one, two; three|four"'
    content = f"sentence{delimiter}label\n{quoted}{delimiter}1\n"
    for text in (("sentence",), ("body",)):  # whether the columns are known or not
        columns = read(tmp_path / f"train.{suffix}", content, text=text).columns
        assert columns == {"sentence": [quoted.strip('"')], "label": [1]}


def test_a_delimiter_that_shows_the_wanted_columns_is_preferred(tmp_path: Path) -> None:
    content = "sentence;label;rated 1,2 or 3\na, b;1;2\n"
    assert read(tmp_path / "train.csv", content).columns["sentence"] == ["a, b"]


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path / "train.csv", "text\na; b | c\n", text=("text",)).columns == {"text": ["a; b | c"]}


def test_windows_line_ends_byte_order_marks_and_blank_lines(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbfsentence,label\r\na,1\r\n\r\nb,0\r\n\r\n"
    assert read(tmp_path / "train.csv", content).columns == {"sentence": ["a", "b"], "label": [1, 0]}
    assert read(tmp_path / "train.tsv", content.replace(b",", b"\t")).columns == {
        "sentence": ["a", "b"],
        "label": [1, 0],
    }
    lines = b'\xef\xbb\xbf{"sentence": "a", "label": 1}\r\n{"sentence": "b", "label": 0}\r\n\r\n'
    assert read(tmp_path / "train.jsonl", lines).columns == {"sentence": ["a", "b"], "label": [1, 0]}


# --- JSON ---------------------------------------------------------------------------------


def test_lines_end_with_a_line_feed_alone(tmp_path: Path) -> None:
    """U+2028, U+2029 and U+0085 may stand raw in a string of JSON, and are no ends of lines."""
    texts = ["a\u2028b", "c\u2029d", "e\u0085f"]
    content = "\n".join(json.dumps({"sentence": text, "label": 1}, ensure_ascii=False) for text in texts)
    assert read(tmp_path / "train.jsonl", content).columns["sentence"] == texts
    assert read(tmp_path / "train.json", content).columns["sentence"] == texts


def test_rows_may_lack_keys(tmp_path: Path) -> None:
    content = '{"sentence": "a", "label": 1, "source": "x"}\n{"sentence": "b", "label": 0}\n{"label": 1, "extra": 2}\n'
    assert read(tmp_path / "train.jsonl", content).columns == {
        "sentence": ["a", "b", None],
        "label": [1, 0, 1],
        "source": ["x", None, None],
        "extra": [None, None, 2],
    }


ROWS = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]
BY_COLUMN = {"sentence": ["a", "b"], "label": [1, 0]}


@pytest.mark.parametrize(
    "document",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1.1", "data": ROWS},
        {"train": ROWS, "test": ROWS[:1]},
        {"rows": ROWS},
        BY_COLUMN,
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_document(tmp_path: Path, document: Any, indent: int | None) -> None:
    assert read(tmp_path / "train.json", json.dumps(document, indent=indent)).columns == BY_COLUMN
    if document is not BY_COLUMN:
        assert read(tmp_path / "train.jsonl", json.dumps(document, indent=indent)).columns == BY_COLUMN


@pytest.mark.parametrize("orient", ["columns", "records", "list"])
@pytest.mark.parametrize("lines", [False, True])
def test_what_pandas_writes(tmp_path: Path, orient: str, lines: bool) -> None:
    table = pd.DataFrame(BY_COLUMN)
    path = tmp_path / "train.json"
    if orient == "list":
        path.write_text(json.dumps(table.to_dict("list")))
    else:
        table.to_json(path, orient="records" if lines else orient, lines=lines)
    assert read(path).columns == BY_COLUMN


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"tokens": ["a", "b"], "tags": ["O", "O"]}
    assert read(tmp_path / "train.jsonl", json.dumps(row)).columns == {name: [value] for name, value in row.items()}
    row = {"sentence": "a", "label": 1}
    assert read(tmp_path / "train.json", json.dumps(row, indent=2)).columns == {"sentence": ["a"], "label": [1]}


# --- names of classes ---------------------------------------------------------------------


def test_names_of_classes_that_a_file_tells(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-X"])),
        }
    )
    rows = {"text": ["a"], "label": [1], "tags": [[0, 1]]}
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    got = read(path)
    assert got.columns == rows
    assert got.class_names == {"label": ("neg", "pos"), "tags": ("O", "B-X")}
    # Older versions wrote lists in other forms.
    old = {"_type": "ClassLabel", "names": ["O"]}
    assert class_names({"a": [old], "b": {"_type": "Sequence", "feature": old}, "c": {"_type": "Value"}}) == {
        "a": ("O",),
        "b": ("O",),
    }


# --- what cannot be read ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.parquet", b"PAR1 this is not parquet", "cannot read .*train.parquet"),
        ("train.csv", b"sentence,label\na,1\nb\n", "cannot read .*train.csv: .*Expected 2 columns, got 1"),
        ("train.csv", b"sentence,label\na, b,1\n", "cannot read .*train.csv: .*Expected 2 columns, got 3: a, b,1"),
        ("train.csv", b"", "cannot read .*train.csv"),
        ("train.csv", b"sentence,sentence,label\na,b,1\n", "two columns are named 'sentence'"),
        ("train.csv", b"a;b|c\n1;2|3\n", r"';' and '\|' may both part the columns of the first line, 'a;b\|c'"),
        ("train.csv", "sentence,label\né,1\n".encode("latin-1"), "cannot read .*train.csv: .*invalid UTF8"),
        ("train.csv", "sentence,label\na,1\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("train.jsonl", '{"sentence": "a"}\n'.encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("train.csv.gz", b"sentence,label\na,1\n", "cannot read .*train.csv.gz"),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n{"sentence": "b"\n', "cannot read .*train.jsonl: line 2:"),
        ("train.jsonl", b'{"sentence": "a"\n{"sentence": "b"}\n', "cannot read .*train.jsonl: line 2:"),
        ("train.jsonl", b'{"sentence": "a", "label": 1}\n7\n', "row 1: expected an object, found int"),
        ("train.json", b'[{"sentence": "a"', "cannot read .*train.json: line 1"),
        ("train.json", b"[7]", "row 0: expected an object, found int"),
        ("train.json", b"7", "expected objects, found int"),
        ("train.json", b'{"a": [{}], "b": [{}]}', "holds a, b: which of them is the train split"),
        ("train.json", b'{"a": {"0": 1}, "b": {"1": 1}}', "its columns have unlike rows"),
        ("train.jsonl", b'{"sentence": "\xff"}\n', "cannot read .*train.jsonl: .*utf-8"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, content)
    assert "\n" not in str(caught.value)


def test_twins_in_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), path)
    with pytest.raises(DataError, match=r"cannot read .*train.parquet: two columns are named 'a'"):
        read(path)
