"""Which files of a local folder hold which split: by the names that people, and the hub, give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from dsprune.errors import DataError
from dsprune.tasks.sources.file_formats import FORMATS, kind_of

__all__ = ["find_files", "holds", "is_official"]

SHARD = re.compile(r"(?P<split>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?")
"""`train-00000-of-00002`; older uploads have a hash behind it."""
NUMBERED = re.compile(r"\d{4}")
"""`train/0000.parquet`, as the hub names what it converted."""
OTHER_NAMES = ("dev", "valid", "val", "eval")
"""What else a validation split is called."""

Source = tuple[Path, ...]
"""One file, or all shards of a split in order."""


def find_files(folder: Path, task: str, splits: Iterable[str]) -> dict[str, Source]:
    """The files of each split, in the folder, its subfolder named as the task, or `data/` in either.

    `train.parquet` is the official split, and so are all shards of it together; a validation split may be called
    `dev`, `valid`, `val` or `eval`. Where there is no such file, one such as `train_partial.parquet` stands in.

    Raises:
        DataError: no such folder, a split without a file or with several, a missing shard.
    """
    if not folder.is_dir():
        raise DataError(f"data.path '{folder}' is not a folder")
    splits = list(splits)
    for place in _places(folder, task):
        found = {split: _candidates(place, split) for split in splits}
        if any(found.values()):
            return {split: _only(place, split, sources) for split, sources in found.items()}
    raise DataError(
        f"data.path '{folder}': neither it nor its subfolder '{task}' holds {', '.join(splits)} ({FORMATS}); "
        f"there is {_listing(folder)}"
    )


def holds(folder: Path, task: str, split: str) -> Path | None:
    """A file of a split, or None where the folder has none."""
    sources = [source for place in _places(folder, task) for source in _candidates(place, split)]
    return sources[0][0] if sources else None


def _places(folder: Path, task: str) -> list[Path]:
    """Where the files of a task may stand, the likeliest place first."""
    places = (folder, folder / task, folder / "data", folder / task / "data")
    return [place for place in places if place.is_dir()]


def is_official(source: Sequence[Path], split: str) -> bool:
    """Whether files bear the name of a split, in one of its forms."""
    path = source[0]
    stem, _ = kind_of(path)
    shard = SHARD.fullmatch(stem)
    name = shard["split"] if shard else path.parent.name if NUMBERED.fullmatch(stem) else stem
    return name in _names_of(split)


def _names_of(split: str) -> list[str]:
    """What a split is called, its official name first."""
    if not split.startswith("validation"):
        return [split]
    return [split, *(split.replace("validation", other, 1) for other in OTHER_NAMES)]


def _candidates(folder: Path, split: str) -> list[Source]:
    """Files under the official name; where there are none, under another one; else those marked as partial."""
    official, *others = _names_of(split)
    partial: list[Source] = [
        (path,) for path in _readable(folder) if path.stem.startswith(f"{split}_") and "partial" in kind_of(path)[0]
    ]
    return _sources(folder, official) or [*chain(*(_sources(folder, name) for name in others))] or partial


def _sources(folder: Path, name: str) -> list[Source]:
    """Files of one name: single ones, and groups of shards."""
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in _readable(folder):
        stem, suffix = kind_of(path)
        shard = SHARD.fullmatch(stem)
        if stem == name:
            groups[path.name,] = [path]
        elif shard and shard["split"] == name:
            groups.setdefault((shard["count"], suffix), []).append(path)
    numbered = [path for path in _readable(folder / name) if NUMBERED.fullmatch(path.stem)]
    return [tuple(group) for group in (*groups.values(), numbered) if group]


def _readable(folder: Path) -> list[Path]:
    """Files that there is a reader for."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path)[1])


def _only(folder: Path, split: str, sources: Sequence[Source]) -> Source:
    """The one source of a split, all of it.

    Raises:
        DataError: none, several, or one of which a part is missing.
    """
    if not sources:
        hint = (
            f": give one of that name (or {', '.join(OTHER_NAMES)}), or hold out a part of the training examples, "
            "data.validation_share = 0.1"
        )
        raise DataError(
            f"data.path '{folder}': no file for split '{split}' ({FORMATS}); there is {_listing(folder)}"
            + hint * (split == "validation")
        )
    if len(sources) > 1:
        names = " and ".join(source[0].name for source in sources)
        raise DataError(f"data.path '{folder}': {names} both stand for split '{split}': keep one")
    _check_whole(sources[0])
    return sources[0]


def _check_whole(source: Source) -> None:
    """Refuse shards with a gap.

    Raises:
        DataError: naming the first that is missing, or that is there twice.
    """
    shards = [SHARD.fullmatch(kind_of(path)[0]) for path in source]
    if shards[0] is None:
        indices = [int(path.stem) for path in source] if NUMBERED.fullmatch(source[0].stem) else [0]
        wanted, width, tail = len(indices), 4, ""
    else:
        indices = [int(shard["index"]) for shard in shards if shard]
        wanted, width, tail = int(shards[0]["count"]), 5, f"-of-{shards[0]['count']}"
    twice = next((i for i in indices if indices.count(i) > 1), None)
    if twice is not None:
        raise DataError(f"{source[0].parent}: shard {twice:0{width}d}{tail} is there twice: keep one")
    missing = sorted(set(range(wanted)) - set(indices))
    if missing:
        raise DataError(
            f"{source[0].parent}: shard {missing[0]:0{width}d}{tail} is missing, beside {source[0].name}: "
            f"{len(indices)} of at least {len(indices) + len(missing)} are there"
        )


def _listing(folder: Path, shown: int = 10) -> str:
    """What a folder holds; of its subfolders, what is in them."""
    entries = sorted(folder.iterdir())
    names = [f"{entry.name}/" + _inside(entry) if entry.is_dir() else entry.name for entry in entries[:shown]]
    listing = ", ".join(names) or "nothing"
    return f"{listing}, and {len(entries) - shown} more" if len(entries) > shown else listing


def _inside(folder: Path, shown: int = 4) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f" (with {', '.join(names[:shown])}{more})" if names else " (empty)"
