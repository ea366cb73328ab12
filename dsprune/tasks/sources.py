"""Where the examples come from: files of a local folder, or the hub.

Local files are read afresh each time and never touch the network or a cache. A file that holds only
part of an official split keeps its own name wherever figures are shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from dsprune.config import DataConfig
from dsprune.errors import ConfigError, DataError

__all__ = ["EvalData", "HubData", "Split", "Splits", "find_files", "read_file", "read_hub", "split_reader"]

Columns = dict[str, list[Any]]

FORMATS = "parquet, csv, tsv, jsonl or json"


@dataclass(frozen=True)
class Split:
    """One split as it was read.

    Attributes:
        name: of the split; for a file that is not the official split, the file's own.
        origin: file or hub address, for messages.
        columns: raw values by column name.
        notes: what figures measured on it have to say.
        whole: it holds all that was read, not just the first examples.
    """

    name: str
    origin: str
    columns: Mapping[str, Sequence[Any]]
    notes: tuple[str, ...] = ()
    whole: bool = True

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def first(self, count: int | None) -> Split:
        """The first so many examples, with a note that says so; all of them for None."""
        if count is None or count >= len(self):
            return self
        note = f"{self.name}: the first {count} of {len(self)} examples"
        columns = {name: values[:count] for name, values in self.columns.items()}
        return replace(self, columns=columns, notes=(*self.notes, note), whole=False)


@dataclass(frozen=True)
class Splits:
    """Training and evaluation examples as they were read; of a task that is only evaluated, `train` is one of these."""

    train: Split
    evals: Mapping[str, Split]

    def __iter__(self) -> Iterator[Split]:
        yield self.train
        yield from self.evals.values()

    def map(self, change: Callable[[Split], Split]) -> Splits:
        """All splits, changed."""
        return Splits(change(self.train), {name: change(split) for name, split in self.evals.items()})


@dataclass(frozen=True)
class HubData:
    """A data set of the hub: its subset, where it has several, and the revision read by default."""

    dataset: str
    subset: str | None = None
    revision: str | None = None


class EvalData(DataConfig):
    """Data settings of a task that is evaluated and not trained: no training examples are looked for."""

    split: str | None = None
    """Which split; by default the task's own evaluation splits."""

    def choose(self, evals: Mapping[str, str]) -> Mapping[str, str]:
        """The splits that are meant, from the name in figures to that in the data set.

        `test` of a task with several evaluation splits means the test split of each.
        """
        asked = self.split
        if asked is None:
            return evals
        named = {name: split for name, split in evals.items() if asked in (name, split)}
        tests = [split.replace("validation", "test") for split in evals.values()]
        return named or (dict(zip(tests, tests, strict=True)) if asked == "test" else {asked: asked})


def split_reader(
    task: str, data: DataConfig, hub: HubData, evals: Mapping[str, str], text_columns: Sequence[str] = ()
) -> Callable[[bool], Splits]:
    """What reads the splits of a task: local files, found now, or the hub.

    Args:
        task: its name.
        data: the user's settings.
        hub: where the splits are, unless they are local.
        evals: evaluation splits, from the name in figures to that in the data set.
        text_columns: columns that csv and tsv files must not take for numbers.

    Raises:
        ConfigError: contradictory settings.
        DataError: `data.path` without the files of the task.
    """
    if data.path is not None and data.revision is not None:
        raise ConfigError("data.revision pins a data set of the hub, and data.path is a local folder: drop one")
    evaluated = data if isinstance(data, EvalData) else None
    evals = evals if evaluated is None else evaluated.choose(evals)
    official = (*(["train"] if evaluated is None else []), *evals.values())
    files = {} if data.path is None else find_files(Path(data.path).expanduser(), task, official)

    def read_split(split: str, limit: int | None, progress: bool) -> Split:
        if split in files:
            return read_file(files[split], split, text_columns=text_columns).first(limit)
        revision = data.revision or hub.revision
        return read_hub(hub.dataset, hub.subset, split, revision=revision, progress=progress).first(limit)

    def read(progress: bool) -> Splits:
        found = {}
        for name, split in evals.items():
            got = read_split(split, data.max_eval_examples, progress)
            found[name if got.name == split else got.name] = got
        if evaluated is not None:
            return Splits(next(iter(found.values())), found)
        return Splits(read_split("train", data.max_train_examples, progress), found)

    return read


# --- local folders ------------------------------------------------------------------------


def find_files(folder: Path, task: str, splits: Iterable[str]) -> dict[str, Path]:
    """The file of each split, in the folder or in its subfolder named as the task.

    `train.parquet` is the official split; where it is absent, one file such as `train_partial.parquet`
    stands in for it.

    Raises:
        DataError: no such folder, a split without a file or with several.
    """
    if not folder.is_dir():
        raise DataError(f"data.path '{folder}' is not a folder")
    splits = list(splits)
    for place in (folder, folder / task):
        found = {split: _candidates(place, split) for split in splits}
        if any(found.values()):
            return {split: _only(place, split, paths) for split, paths in found.items()}
    raise DataError(
        f"data.path '{folder}': neither it nor its subfolder '{task}' holds {', '.join(splits)} ({FORMATS}); "
        f"there is {_listing(folder)}"
    )


def _candidates(folder: Path, split: str) -> list[Path]:
    """Files that carry the official name or, where there are none, those marked as partial."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in READERS)
    official = [path for path in files if path.stem == split]
    return official or [path for path in files if path.stem.startswith(f"{split}_") and "partial" in path.stem]


def _only(folder: Path, split: str, paths: Sequence[Path]) -> Path:
    if not paths:
        raise DataError(f"data.path '{folder}': no file for split '{split}' ({FORMATS}); there is {_listing(folder)}")
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        raise DataError(f"data.path '{folder}': {names} both stand for split '{split}': keep one")
    return paths[0]


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    shown = ", ".join(names[:10]) or "nothing"
    return f"{shown}, and {len(names) - 10} more" if len(names) > 10 else shown


def read_file(path: Path, split: str, *, text_columns: Sequence[str]) -> Split:
    """One local file as a split.

    Args:
        path: a parquet, csv, tsv, jsonl or json file; the columns of csv and tsv stand in the first line.
        split: the official split that it stands for.
        text_columns: columns that csv and tsv must not take for numbers.

    Raises:
        DataError: a file that cannot be read.
    """
    try:
        columns = READERS[path.suffix](path, text_columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {_reason(error)}") from error
    if path.stem == split:
        return Split(split, str(path), columns)
    return Split(path.stem, str(path), columns, (f"{path.stem}: {path.name} is not the official {split} split",))


def _read_parquet(path: Path, _: Sequence[str]) -> Columns:
    with path.open("rb") as file:
        columns: Columns = pa.parquet.read_table(file).to_pydict()
    return columns


def _read_delimited(path: Path, text_columns: Sequence[str], *, delimiter: str, quote_char: str | bool) -> Columns:
    columns: Columns = pa.csv.read_csv(
        path,
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter, quote_char=quote_char, newlines_in_values=bool(quote_char)
        ),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string())),
    ).to_pydict()
    return columns


def _read_json(path: Path, _: Sequence[str]) -> Columns:
    """One object a line, or one list of objects."""
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return _transpose(json.loads(text))
    return _transpose([_parse_line(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()])


def _parse_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg}") from error


def _transpose(rows: Sequence[Any]) -> Columns:
    names = list(rows[0]) if rows and isinstance(rows[0], dict) else []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: expected an object, found {type(row).__name__}")
        if set(row) != set(names):
            raise ValueError(f"row {number}: has columns {', '.join(row)}, the first row has {', '.join(names)}")
    return {name: [row[name] for row in rows] for name in names}


READERS: dict[str, Callable[[Path, Sequence[str]], Columns]] = {
    ".parquet": _read_parquet,
    ".csv": partial(_read_delimited, delimiter=",", quote_char='"'),
    # GLUE's own tsv files are written without quoting, and a lone quote mark is text.
    ".tsv": partial(_read_delimited, delimiter="\t", quote_char=False),
    ".jsonl": _read_json,
    ".json": _read_json,
}
"""Reader of each kind of file; `find_files` looks for these."""


# --- the hub ------------------------------------------------------------------------------


def read_hub(
    dataset: str, subset: str | None, split: str, *, revision: str | None = None, progress: bool = False
) -> Split:
    """One split of a hub data set, downloaded or from the local cache of `datasets`.

    Raises:
        DataError: it cannot be had.
    """
    import datasets  # seconds of imports that local and generated data do not need

    origin = f"{dataset} ({', '.join(filter(None, (subset, split)))}) on the hub"
    if not progress:
        datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(dataset, subset, split=split, revision=revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot get {origin}: {_reason(error)}; a local folder can be given as data.path") from error
    return Split(split, origin + _commit(table), {name: list(table[name]) for name in table.column_names})


def _commit(table: Any) -> str:
    """The hub commit that a table was read at, from the addresses of its files (`hf://datasets/NAME@COMMIT/FILE`)."""
    addresses = table.info.download_checksums or {}
    commits = sorted({address.partition("@")[2].partition("/")[0] for address in addresses if "@" in address})
    return f", commit {', '.join(commits)}" if commits else ""


def _reason(error: Exception) -> str:
    """The first line of a foreign error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
