"""Files of examples, whole, as columns: parquet, csv and tsv with any usual delimiter, JSON and JSON Lines.

csv, tsv and JSON may be compressed. What a file does not say is not guessed: a column of text is text whatever stands
in it, and a delimiter is one that the header holds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dsprune.errors import DataError

__all__ = ["FORMATS", "Table", "class_names", "kind_of", "read_table"]

FORMATS = "parquet, csv, tsv, jsonl or json"
COMPRESSED = (".gz", ".bz2", ".zst")
DELIMITERS = (",", "\t", ";", "|")

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Table:
    """What a file holds.

    Attributes:
        columns: values by column name.
        class_names: of columns whose integers stand for classes, the names of these, where the file tells them.
        notes: what is to be said of how it was read.
    """

    columns: Columns
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def kind_of(path: Path) -> tuple[str, str]:
    """Name of a file without its endings, and the ending that tells its format; the latter "" for other files."""
    packed = path.suffix in COMPRESSED
    plain = Path(path.stem) if packed else Path(path.name)
    readable = plain.suffix in READERS and not (packed and plain.suffix == ".parquet")
    return plain.stem, plain.suffix if readable else ""


def read_table(path: Path, split: str, *, text_columns: Sequence[str]) -> Table:
    """One local file.

    Args:
        path: a file that `kind_of` knows; the columns of csv and tsv stand in the first line.
        split: that it is read for, by which one JSON object for all splits is taken apart.
        text_columns: columns that csv and tsv must not take for numbers.

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        return READERS[kind_of(path)[1]](path, split, text_columns)
    except (pa.ArrowException, OSError, ValueError, EOFError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"cannot read {path}: {reason}") from error


def _content(path: Path) -> bytes:
    """All of a file of text, unpacked."""
    with pa.input_stream(str(path), compression="detect") as stream:
        content: bytes = stream.read()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16: save it as UTF-8")
    return content


# --- parquet ------------------------------------------------------------------------------


def _read_parquet(path: Path, _split: str, _text_columns: Sequence[str]) -> Table:
    with path.open("rb") as stream:
        file = pa.parquet.ParquetFile(stream)
        _refuse_twins(file.schema_arrow.names)
        table = file.read()
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = about.get("info", {}).get("features", {})
    return Table(table.to_pydict(), class_names(features))


def class_names(features: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The names of classes that columns of integers, or of lists of them, stand for.

    Args:
        features: of a data set, as `datasets` writes them beside it.
    """
    found = {column: _names_in(feature) for column, feature in features.items()}
    return {column: names for column, names in found.items() if names}


def _names_in(feature: Any) -> tuple[str, ...]:
    if isinstance(feature, list) and len(feature) == 1:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return ()
    if feature.get("_type") == "ClassLabel":
        return tuple(map(str, feature.get("names") or ()))
    return _names_in(feature.get("feature"))


# --- csv and tsv --------------------------------------------------------------------------


def _read_delimited(path: Path, _split: str, text_columns: Sequence[str], *, usual: str) -> Table:
    content = _content(path)
    header = content.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0].decode(errors="replace").rstrip("\r")
    delimiter = _delimiter(header, usual, text_columns)
    # GLUE's own tsv files are written without quoting, and a lone quote mark is text.
    quoted = usual == "," or delimiter != usual
    _refuse_twins(_fields(header, delimiter))
    table = pa.csv.read_csv(
        pa.BufferReader(content),
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string())),
    )
    columns: Columns = table.to_pydict()
    return Table(columns, notes=() if quoted else _quoted_cells(path, columns))


def _fields(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter), [])


def _delimiter(header: str, usual: str, wanted: Sequence[str]) -> str:
    """What parts the columns: that which shows most of the wanted ones, else the usual one if it parts anything.

    Raises:
        ValueError: several others would do as well.
    """
    fields = {mark: _fields(header, mark) for mark in (usual, *(mark for mark in DELIMITERS if mark != usual))}
    shown = {mark: len(set(wanted) & set(names)) for mark, names in fields.items()}
    best = [mark for mark in fields if shown[mark] == max(shown.values())]
    if usual in best and (max(shown.values()) > 0 or len(fields[usual]) > 1):
        return usual
    parting = [mark for mark in best if len(fields[mark]) > 1]
    if len(parting) > 1:
        marks = " and ".join(map(repr, parting))
        raise ValueError(f"{marks} may both part the columns of the first line, {header[:80]!r}: write it with commas")
    return parting[0] if parting else usual


def _quoted_cells(path: Path, columns: Columns) -> tuple[str, ...]:
    """Say so where cells of a tsv look as if they were quoted, which is not undone."""
    for name, values in columns.items():
        rows = [row for row, cell in enumerate(values) if isinstance(cell, str) and _is_quoted(cell)]
        if rows:
            return (
                f"{path.name}: {len(rows)} cells of column '{name}' look quoted (the first in row {rows[0]}, from 0), "
                "and a tsv is read without quoting; named .csv, with its tabs, it is read with",
            )
    return ()


def _is_quoted(cell: str) -> bool:
    """Whether a cell is in quote marks, with others that are doubled inside, as programs write it."""
    inside = cell[1:-1]
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in inside and '"' not in inside.replace('""', "")


def _refuse_twins(names: Sequence[str]) -> None:
    twin = next((name for name in names if list(names).count(name) > 1), None)
    if twin is not None:
        raise ValueError(f"two columns are named '{twin}'")


# --- JSON ---------------------------------------------------------------------------------


def _read_json(path: Path, split: str, _text_columns: Sequence[str]) -> Table:
    """One object a line, or one document: a list of objects, or an object that holds one.

    Lines end with a line feed and with nothing else: U+2028, U+2029 and U+0085 may stand in a string (jsonlines.org).
    """
    text = _content(path).decode("utf-8-sig")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return Table({})
    if _is_object(lines[0][1]) and len(lines) > 1:
        return Table(_transpose([_parse(line, number) for number, line in lines]))
    return Table(_from_document(_parse(text), split, by_column=kind_of(path)[1] == ".json"))


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _parse(text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line or error.lineno}: {error.msg}") from error


def _from_document(document: Any, split: str, *, by_column: bool) -> Columns:
    """Columns of a list of objects, or of any of the objects in which people and pandas keep them.

    Args:
        document: the whole file.
        split: that it is read for.
        by_column: an object of lists is columns, and not one row.
    """
    rows = document if isinstance(document, list) else _nested_rows(document, split)
    if rows is not None:
        return _transpose(rows)
    values = list(document.values())
    if by_column and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return dict(document)
    if all(isinstance(value, dict) and value and all(key.isdigit() for key in value) for value in values):
        # What pandas writes by default: by column, then by row.
        if any(list(value) != list(values[0]) for value in values):
            raise ValueError("its columns have unlike rows")
        return {name: list(value.values()) for name, value in document.items()}
    return _transpose([document])


def _nested_rows(document: Any, split: str) -> list[Any] | None:
    """The list of objects that an object holds under the split's name, under `data`, or as the only thing.

    Raises:
        ValueError: nothing but several such lists, under other names; no object at all.
    """
    if not isinstance(document, dict):
        raise ValueError(f"expected objects, found {type(document).__name__}")
    lists = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
    }
    key = next((key for key in (split, "data") if key in lists), None)
    if key is None and lists and len(lists) == len(document):
        if len(lists) > 1:
            raise ValueError(f"holds {', '.join(lists)}: which of them is the {split} split? name it so")
        key = next(iter(lists))
    return None if key is None else lists[key]


def _transpose(rows: Sequence[Any]) -> Columns:
    """Rows as columns; None where a row lacks a key that others have."""
    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: expected an object, found {type(row).__name__}")
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for row in rows] for name in names}


READERS: dict[str, Callable[[Path, str, Sequence[str]], Table]] = {
    ".parquet": _read_parquet,
    ".csv": partial(_read_delimited, usual=","),
    ".tsv": partial(_read_delimited, usual="\t"),
    ".jsonl": _read_json,
    ".json": _read_json,
}
"""Reader of each kind of file, by its ending."""
