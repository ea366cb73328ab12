"""Names of weights in files, and the weights of a model that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

__all__ = ["MatchedNames", "match_names"]

INNER_WRAPPERS = r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
"""What `torch.compile`, FSDP and activation checkpointing put into names, at any place."""
OUTER_WRAPPERS = ("module.", "model.", "model.module.", "module.model.")
"""What data parallelism, training modules that hold a model, and both, put before all of its names."""
SAME = "(?:)"
"""Matches nothing: two patterns that differ by it alone are two entries of a table, and so two renamings."""


@dataclass(frozen=True)
class MatchedNames:
    """Which names belong together.

    Attributes:
        named: for each weight of the model that the files hold, its name there.
        renames: patterns of names in the files and what takes their place, one occurrence each, in this order.
        taken: what was found to be a wrapper's part of the names.
    """

    named: dict[str, str]
    renames: dict[str, str]
    taken: tuple[str, ...]


def match_names(names: Sequence[str], expected: Collection[str], base: str) -> MatchedNames:
    """Match names in files with the weights of a model, with or without what wrappers of the model add to them.

    `_orig_mod.bert.pooler.dense.weight`, `module.bert.pooler.dense.weight` and `pooler.dense.weight` all stand for
    `bert.pooler.dense.weight`. A prefix is taken for a wrapper's only if more weights are found without it, and no
    two names become one.

    Args:
        names: in the files.
        expected: the model's weights.
        base: prefix of the model's own base, which files of a bare base lack.
    """

    def place(name: str) -> str | None:
        candidates = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
        return next((candidate for candidate in candidates if candidate in expected), None)

    bare = [re.sub(INNER_WRAPPERS, "", name) for name in names]
    taken = sorted({part for name in names for part in re.findall(INNER_WRAPPERS, name)})
    depth = max((len(re.findall(INNER_WRAPPERS, name)) for name in names), default=0)
    renames = {SAME * i + INNER_WRAPPERS: "" for i in range(depth)}
    if prefix := _outer_wrapper(bare, place):
        renames[f"^{re.escape(prefix)}"] = ""
        bare = [name.removeprefix(prefix) for name in bare]
        taken.append(prefix)
    named = {there: name for name, short in zip(names, bare, strict=True) if (there := place(short)) is not None}
    return MatchedNames(named, renames, tuple(taken))


def _outer_wrapper(names: Sequence[str], place: Callable[[str], str | None]) -> str:
    """The prefix without which most weights are found, and no two names are one; empty where all are found with it."""
    best, most = "", sum(place(name) is not None for name in names)
    for prefix in OUTER_WRAPPERS:
        shorter = [name.removeprefix(prefix) for name in names]
        found = sum(place(name) is not None for name in shorter)
        if found > most and len(set(shorter)) == len(names):
            best, most = prefix, found
    return best
