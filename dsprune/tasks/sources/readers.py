"""Where the examples come from: files of a local folder, or the hub; under the names of columns that a task knows.

Local files are read afresh each time and never touch the network or a cache. A file that holds only
part of an official split keeps its own name wherever figures are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsprune.config import DataConfig
from dsprune.errors import ConfigError, DataError
from dsprune.files import did_you_mean
from dsprune.tasks.sources.file_formats import class_names, kind_of, read_table
from dsprune.tasks.sources.folders import find_files, holds, is_official
from dsprune.tasks.sources.splits import HELD_OUT, Split, Splits, hold_out, renamed, with_class_names

__all__ = [
    "EvalData",
    "HubData",
    "SplitReader",
    "eval_splits",
    "named_data",
    "read_files",
    "read_hub",
]


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


class SplitReader:
    """Reads the splits of a task, from local files or from the hub; called, it gives all of them.

    Local files are found when it is made, and read when it is called.

    Args:
        task: its name.
        data: the user's settings.
        hub: where the splits are, unless they are local.
        evals: evaluation splits, from the name in figures to that in the data set.
        columns: that the task reads.
        text_columns: those that csv and tsv files must not take for numbers.

    Raises:
        ConfigError: contradictory settings, or `data.columns` of which the task knows nothing.
        DataError: `data.path` without the files of the task.
    """

    def __init__(
        self,
        task: str,
        data: DataConfig,
        hub: HubData,
        evals: Mapping[str, str],
        columns: Sequence[str],
        text_columns: Sequence[str] = (),
    ) -> None:
        self._data = data
        self._hub = hub
        self._columns = tuple(columns)
        self._text = [data.columns.get(column, column) for column in text_columns]
        mistakes = [
            *_source_mistakes(data),
            *_column_mistakes(task, data, columns),
            *_share_mistakes(task, data, evals),
        ]
        if mistakes:
            raise ConfigError(*mistakes)
        self._trains = not isinstance(data, EvalData)
        evals = data.choose(evals) if isinstance(data, EvalData) else evals
        held_out = data.validation_share is not None
        self._evals = {name: split for name, split in evals.items() if not (held_out and split == "validation")}
        self._files = {}
        if data.path is not None:
            folder = Path(data.path).expanduser()
            wanted = (*(("train",) if self._trains else ()), *self._evals.values())
            self._files = find_files(folder, task, wanted)
            there = holds(folder, task, "validation") if held_out else None
            if there:
                raise ConfigError(
                    f"data.validation_share = {data.validation_share}: {there} is there already: drop one"
                )
        self._train: Split | None = None

    def training(self) -> Split:
        """All training examples, before any are held out; kept until the reader is called.

        Of a task that is only evaluated, the examples of its first split.
        """
        if self._train is None:
            first = "train" if self._trains else next(iter(self._evals.values()))
            self._train = self._read(first, progress=False)
        return self._train

    def __call__(self, progress: bool) -> Splits:
        """All splits, as many examples of each as are wanted.

        Args:
            progress: whether it may be shown.

        Raises:
            DataError: a split that cannot be read, or lacks a column of `data.columns`.
        """
        evals = {name: self._read(split, progress) for name, split in self._evals.items()}
        train, self._train = self._train, None
        if train is None:
            train = self._read("train", progress) if self._trains else next(iter(evals.values()))
        found = {name if got.name == self._evals[name] else got.name: got for name, got in evals.items()}
        if self._data.validation_share is not None:
            train, held = hold_out(train, self._data.validation_share)
            found = {HELD_OUT: held} | found
        found = {name: got.first(self._data.max_eval_examples) for name, got in found.items()}
        return Splits(train.first(self._data.max_train_examples), found)

    def _read(self, split: str, progress: bool) -> Split:
        if split in self._files:
            got = read_files(self._files[split], split, text_columns=self._text)
        else:
            revision = self._data.revision or self._hub.revision
            got = read_hub(self._hub.dataset, self._hub.subset, split, revision=revision, progress=progress)
        return with_class_names(renamed(got, self._data.columns), self._columns)


def _source_mistakes(data: DataConfig) -> list[str]:
    if data.path is not None and data.revision is not None:
        return ["data.revision pins a data set of the hub, and data.path is a local folder: drop one"]
    return []


def _column_mistakes(task: str, data: DataConfig, columns: Sequence[str]) -> list[str]:
    """Names on the left of `data.columns` are the task's, and nobody's column is read twice."""
    mistakes = []
    for role in data.columns:
        if role not in columns:
            hint = did_you_mean(role, columns, otherwise=f"it reads {', '.join(columns)}")
            mistakes.append(f"data.columns.{role}: task '{task}' reads no column '{role}'; {hint}")
    given = list(data.columns.values())
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        mistakes.append(f"data.columns: column '{twice}' is named twice")
    return mistakes


def _share_mistakes(task: str, data: DataConfig, evals: Mapping[str, str]) -> list[str]:
    if data.validation_share is None or "validation" in evals.values():
        return []
    return [f"data.validation_share: task '{task}' is evaluated on {', '.join(evals.values())}, and not on one split"]


# --- local folders ------------------------------------------------------------------------


def read_files(paths: Sequence[Path], split: str, *, text_columns: Sequence[str]) -> Split:
    """One local file, or all shards of one, as a split.

    Args:
        paths: in order.
        split: the official split that they stand for.
        text_columns: columns that csv and tsv must not take for numbers.

    Raises:
        DataError: a file that cannot be read, or that has other columns than the first.
    """
    tables = [read_table(path, split, text_columns=text_columns) for path in paths]
    columns = tables[0].columns
    for path, table in zip(paths[1:], tables[1:], strict=True):
        if set(table.columns) != set(columns):
            raise DataError(f"{path}: has columns {', '.join(table.columns)}, and {paths[0].name} {', '.join(columns)}")
        columns = {name: [*values, *table.columns[name]] for name, values in columns.items()}
    official = is_official(paths, split)
    name = split if official else kind_of(paths[0])[0]
    notes = () if official else (f"{name}: {paths[0].name} is not the official {split} split",)
    told = tuple(f"{name}: {note}" for table in tables for note in table.notes)
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    return Split(name, origin, columns, (*notes, *told), class_names=tables[0].class_names)


# --- the hub ------------------------------------------------------------------------------


def named_data(task: str, data: DataConfig, default: HubData | None) -> HubData:
    """The data set of the hub that the user names, or the default.

    Raises:
        ConfigError: none is named, and there is neither a default nor a local folder.
    """
    if data.dataset is not None:
        return HubData(data.dataset, data.subset)
    if data.subset is not None:
        raise ConfigError(f"data.subset = '{data.subset}': of which data set? give data.dataset as well")
    if default is None and data.path is None:
        raise ConfigError(
            f"task '{task}' has no data set of its own: give data.dataset, or a local folder as data.path"
        )
    return default or HubData("")


def eval_splits(data: DataConfig) -> dict[str, str]:
    """Evaluation splits by their names in figures.

    Raises:
        ConfigError: none but the test split, which must not pick the best model.
    """
    if not set(data.evals) - {"test"} or len(set(data.evals)) < len(data.evals):
        raise ConfigError(f"data.evals = {list(data.evals)}: name each split once, and one beside 'test'")
    return {split: split for split in data.evals}


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
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"cannot get {origin}: {reason}; a local folder can be given as data.path") from error
    columns = {name: list(table[name]) for name in table.column_names}
    return Split(split, origin + _commit(table), columns, class_names=class_names(table.features.to_dict()))


def _commit(table: Any) -> str:
    """The hub commit that a table was read at, from the addresses of its files (`hf://datasets/NAME@COMMIT/FILE`)."""
    addresses = table.info.download_checksums or {}
    commits = sorted({address.partition("@")[2].partition("/")[0] for address in addresses if "@" in address})
    return f", commit {', '.join(commits)}" if commits else ""
