"""What the files of a model source are to the model that a task needs.

Nothing random stands where something trained should, nothing is left out without a word, and the rows of the head come
into the task's order. All of it is decided from the configuration and the headers of the weight files, before any
weight is read, in the same way on every rank and at every ZeRO stage: under ZeRO-3 `from_pretrained` itself compares
less, and on one rank alone.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from dsprune.consolidate import own_head_keys
from dsprune.engine.models.labelling import listed, name_labels, output_order
from dsprune.engine.models.loading_plan import LoadingPlan, class_for, not_there, unlike_files, without_weights
from dsprune.engine.models.weight_files import WeightFiles, find_weights
from dsprune.engine.models.weight_names import MatchedNames, match_names
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.files import first_line
from dsprune.pretrained import read_model_config
from dsprune.structure.layout import family_of, head_paths
from dsprune.tasks import Task
from dsprune.tasks.label_order import has_default_names

__all__ = ["plan_loading"]

logger = logging.getLogger(__name__)
SCRATCH_HINT = "; to begin with random weights, say model.from_scratch=true"


def plan_loading(
    source: str, task: Task, *, revision: str | None = None, fresh_head: bool = False, download: bool = True
) -> LoadingPlan:
    """See that a source holds the model that a task needs. What is not as it should be, and can be mended, is logged.

    Args:
        source: folder or hub id.
        task: decides the head.
        revision: of the hub.
        fresh_head: whether the head may be missing, and then begins at random numbers.
        download: fetch weights that are not here yet; without it such weights are believed to be complete.

    Raises:
        ConfigError: the source cannot be read.
        ArchitectureError: a family that dsprune does not know, a model that does not fit the task, labels that are not
            the task's, weights that are missing or of another shape.
    """
    config = read_model_config(source, revision)
    check = _Check(source, task, config, may_be_fresh=fresh_head and task.problem != "text")
    weights = find_weights(
        source,
        revision,
        named=getattr(config, "transformers_weights", None),
        download=download,
        hint=SCRATCH_HINT if fresh_head else "",
    )
    plan = check.plan(weights, revision)
    for level, text in check.notes:
        _say(level, f"model '{source}': {text}")
    return plan


@functools.cache
def _say(level: int, text: str) -> None:
    """Log a line: once, though a source is looked at by preflight and by every stage, and on one rank."""
    if os.environ.get("RANK", "0") == "0":
        logger.log(level, text)


class _Check:
    """One comparison of a source with the model that a task needs."""

    def __init__(self, source: str, task: Task, config: PretrainedConfig, *, may_be_fresh: bool) -> None:
        self.source, self.task, self.config, self.may_be_fresh = source, task, config, may_be_fresh
        self.family = family_of(config)
        self.cls = class_for(source, task, config)
        self.notes: list[tuple[int, str]] = []
        self.matched = MatchedNames({}, {}, ())
        self.dropped: set[str] = set()
        """Names in the files of another task's head."""
        model = without_weights(self.cls, config)
        self.expected = set(model.state_dict())
        self.tied: Mapping[str, str] = model.all_tied_weights_keys
        self.base = str(model.base_model_prefix)
        self.head = head_paths(self.family, self.cls.__name__)

    def plan(self, weights: WeightFiles | None, revision: str | None) -> LoadingPlan:
        if weights is not None:
            self.matched = match_names(list(weights.shapes), self.expected, self.base)
            if taken := ", ".join(self.matched.taken):
                self.notes.append((logging.INFO, f"names in its files have {taken} in them, which is taken off"))
            self._untie(weights)
        fresh = self._fresh_weights(weights)
        order = None
        if fresh:
            name_labels(self.config, self.task)
        else:
            order = self._order()
        kept = None
        if weights is not None:
            kept = weights.without(self.dropped)
            self._compare(kept, fresh)
        return LoadingPlan(
            source=self.source,
            revision=revision,
            cls=self.cls,
            config=self.config,
            renames=self.matched.renames,
            kept=kept if self.dropped else None,
            fresh=frozenset(fresh),
            order=order,
        )

    # --- heads ------------------------------------------------------------------------------

    def _of_modules(self, paths: tuple[str, ...]) -> set[str]:
        return {name for name in self.expected if name.rpartition(".")[0] in paths}

    def _fresh_weights(self, weights: WeightFiles | None) -> set[str]:
        """Weights that are to be random: those of a head that is not there, or is another task's."""
        ours = self._of_modules(self.head)
        claimed = self.cls.__name__ in (self.config.architectures or [])
        if weights is None:
            return ours if self.may_be_fresh and not claimed else set()
        there = ours & self.matched.named.keys()
        if there and not claimed and there <= self._claimed_names:
            self._drop_head(sorted(there))
        elif there or not self.may_be_fresh:
            return set()
        elif claimed:
            name = (self.config.architectures or [""])[0]
            self.notes.append((logging.WARNING, f"its config.json names a {name}, and its files hold no head of one"))
        pooler = self._of_modules(tuple(f"{self.base}.{path}" for path in self.family.pooler))
        fresh = ours if pooler & self.matched.named.keys() else ours | pooler
        named = ", ".join(sorted(fresh))
        self.notes.append((logging.INFO, f"random weights, to be trained for task '{self.task.name}': {named}"))
        return fresh

    def _drop_head(self, there: list[str]) -> None:
        architecture = (self.config.architectures or [""])[0]
        if not self.may_be_fresh:
            raise ArchitectureError(
                f"model '{self.source}' is a {architecture}, and task '{self.task.name}' needs a {self.cls.__name__}: "
                f"{there[0]} is of another task"
            )
        self.dropped = {self.matched.named[name] for name in there}

    @functools.cached_property
    def _claimed_names(self) -> frozenset[str]:
        """Weights of the class that the configuration names, where that is another one."""
        name = (self.config.architectures or [""])[0]
        cls = getattr(transformers, name, None) if name else None
        if cls is None or cls is self.cls or not hasattr(cls, "_from_config"):
            return frozenset()
        return frozenset(without_weights(cls, self.config).state_dict())

    def _order(self) -> list[int] | None:
        order = output_order(self.source, self.config, self.task)
        theirs, ours = listed(self.config), ", ".join(self.task.labels)
        if order is not None:
            text = f"its labels ({theirs}) are the task's in another order: the rows of its head are put into that of "
            self.notes.append((logging.INFO, f"{text}the task ({ours})"))
        elif self.task.labels and has_default_names(self.config.id2label):
            text = f"it does not name its labels ({theirs}): taken to be in the task's order ({ours})"
            self.notes.append((logging.WARNING, text))
        return order

    def _untie(self, weights: WeightFiles) -> None:
        """Where the files hold a head of its own and the configuration says that it is the word embedding, the files
        are right."""
        heads = {f"{path}.weight" for path in self.head}
        for name, origin in self.tied.items():
            if not {name, origin} <= self.matched.named.keys():
                continue
            if torch.equal(weights.read(self.matched.named[name]), weights.read(self.matched.named[origin])):
                continue
            if name not in heads:
                raise ArchitectureError(
                    f"model '{self.source}': {name} and {origin} are one weight of a {self.cls.__name__}, and "
                    "differ in its files"
                )
            for key, value in own_head_keys(str(self.config.model_type)).items():
                setattr(self.config, key, value)
            text = f"its files hold a head of its own ({name}), and its config.json says that it is the word embedding"
            self.notes.append((logging.WARNING, f"{text}: the head of the files is used, and written"))

    # --- what is there and what is not ------------------------------------------------------

    def _compare(self, weights: WeightFiles, fresh: set[str]) -> None:
        try:
            found = unlike_files(self.cls, self.config, weights.shapes, self.matched.renames)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load model '{self.source}': {first_line(error)}") from error
        self._refuse_shapes(found["mismatched_keys"])
        self._refuse_missing(set(found["missing_keys"]) - fresh)
        self._tell_left(set(found["unexpected_keys"]) | self.dropped)

    def _refuse_shapes(self, unlike: set[tuple[str, Any, Any]]) -> None:
        if not unlike:
            return
        name, theirs, ours = min(unlike)
        raise ArchitectureError(
            f"model '{self.source}': {name} is {list(theirs)} in its files and {list(ours)} by its config.json"
            + (f", and {len(unlike) - 1} more differ" if len(unlike) > 1 else "")
        )

    def _refuse_missing(self, missing: set[str]) -> None:
        if not missing:
            return
        hint = ""
        if missing <= self._of_modules(self.head):
            text = f"model '{self.source}' was not trained for task '{self.task.name}': {not_there(missing)}"
            if self.task.problem == "text":
                hint = '; if its head is the word embedding, its config.json has to say "tie_word_embeddings": true'
        else:
            text = f"model '{self.source}' is not complete: {not_there(missing)}"
        raise ArchitectureError(f"{text}{hint}")

    def _tell_left(self, left: set[str]) -> None:
        """Say which tensors find no place: parts of another head, or what nobody knows."""
        pooler = {name for name in left if any(f"{path}." in name for path in self.family.pooler)}
        known = left & (self._claimed_names | pooler) if left else set()
        if known:
            parts = sorted({_part(name, self.base) for name in known})
            self.notes.append((logging.INFO, f"not needed for task '{self.task.name}', left out: {', '.join(parts)}"))
        if unknown := sorted(left - known):
            text = f"{len(unknown)} tensors of its files have no place in a {self.cls.__name__} and are left out"
            self.notes.append((logging.WARNING, f"{text}, the first is {unknown[0]}"))


def _part(name: str, base: str) -> str:
    """Which part of a model a weight belongs to."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == base and rest else first
