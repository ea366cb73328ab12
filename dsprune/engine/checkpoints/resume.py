"""Going on from a checkpoint: the newest one that is whole, verified by all ranks before any of it is used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from dsprune.consolidate import check_files, read_manifest
from dsprune.engine.checkpoints.reshard import load_resharded
from dsprune.engine.checkpoints.store import TAG, CheckpointStore
from dsprune.engine.learning.replica import Replica
from dsprune.engine.zero.config import engine_precision
from dsprune.engine.zero.shard_files import only_weights
from dsprune.errors import CheckpointError, ConfigError, OutputError
from dsprune.run_folder import REPLICA, STATE, STATE_TENSORS

__all__ = ["Restored", "check_drift", "find_newest", "restore"]

Say = Callable[[str], None]
"""Tells people, once and not on every rank."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint said beside weights and gates: small JSON values, and small tensors."""

    path: Path
    state: dict[str, Any]
    tensors: dict[str, Tensor]


def find_newest(store: CheckpointStore, policy: Literal["auto", "must", "never"], say: Say) -> Path | None:
    """The newest checkpoint of which every file is what was written; None where a stage may begin. Collective.

    Newer ones that are damaged are set aside under another name, and said so.

    Raises:
        CheckpointError: there are checkpoints and all are damaged, or there are none and `policy` is must.
        OutputError: there are some, and `policy` is never.
    """
    with store.world.together("looking for checkpoints"):
        notes = store.tidy() if store.world.is_main else []
    names = store.world.broadcast([path.name for path in store.named()] if store.world.is_main else None)
    for note in notes:
        say(f"{store.stage}: {note}")
    if names and policy == "never":
        raise OutputError(f"{store.folder} holds checkpoints, and checkpoint.resume = 'never': choose another output=")
    damaged: dict[str, str] = {}
    for name in reversed(names):
        reason = _damage(store, store.folder / name)
        if reason is None:
            _set_aside(store, damaged, say)
            return store.folder / name
        damaged[name] = reason
    if damaged:
        reasons = "; ".join(damaged.values())
        raise CheckpointError(
            f"no checkpoint in {store.folder} is whole: {reasons}: remove {store.folder} to begin anew"
        )
    if policy == "must":
        raise CheckpointError(f"{store.folder} holds no checkpoint, and checkpoint.resume = 'must'")
    return None


def _damage(store: CheckpointStore, path: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is. Each rank looks at its share of the files. Collective."""
    try:
        with store.world.together(f"verifying {path}"):
            check_files(path, read_manifest(path), hashes=True, share=(store.world.rank, store.world.size))
    except CheckpointError as error:
        return str(error)
    return None


def _set_aside(store: CheckpointStore, damaged: Mapping[str, str], say: Say) -> None:
    """A damaged checkpoint must not stand where the run will save again."""
    with store.world.together("setting damaged checkpoints aside"):
        for name, reason in damaged.items():
            say(f"{store.stage}: damaged checkpoint, going back to the one before: {reason}")
            if store.world.is_main:
                path, count = store.folder / f"damaged-{name}", 1
                while path.exists():
                    path, count = store.folder / f"damaged-{name}-{count}", count + 1
                (store.folder / name).rename(path)


def restore(
    path: Path, store: CheckpointStore, engine: Any, replica: Replica | None, *, reshard: bool, say: Say
) -> Restored:
    """Load a verified checkpoint into engine and replica. Collective: all ranks must call.

    Raises:
        CheckpointError: it is of another world size or ZeRO stage and `reshard` is off, or of another model.
    """
    manifest = read_manifest(path)
    theirs = (manifest["world_size"], manifest["zero_stage"], manifest["precision"])
    ours = (store.world.size, engine.zero_optimization_stage(), engine_precision(engine))
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    with store.world.together(f"loading {path}"):
        if engine.basic_optimizer is None:
            pass  # weights that do not train are those that the stage began with, and no rank has a part of the rest
        elif theirs == ours:
            with only_weights(engine):
                engine.load_checkpoint(str(path), tag=TAG, load_lr_scheduler_states=False)
        elif reshard:
            say(f"{store.stage}: converting {path}: saved by {_shape(*theirs)}, going on with {_shape(*ours)}")
            load_resharded(engine, path / TAG, state["engine"])
        else:
            raise CheckpointError(
                f"{path} was saved by {_shape(*theirs)}, this launch has {_shape(*ours)}, and checkpoint.reshard is off"
            )
        if replica is not None:
            replica.load(str(path / REPLICA))
    tensors = path / STATE_TENSORS
    return Restored(path, state, load_file(str(tensors)) if tensors.exists() else {})


def _shape(world_size: int, zero_stage: int, precision: str) -> str:
    return f"{world_size} rank(s) at ZeRO stage {zero_stage} in {precision}"


def check_drift(theirs: Mapping[str, Any], ours: Mapping[str, Any], allowed: Sequence[str], path: Path) -> None:
    """Refuse to go on with other settings than those that a checkpoint was trained with.

    Args:
        theirs: settings of the checkpoint, nested.
        ours: of this launch.
        allowed: dotted keys, or tables, that may differ.
        path: of the checkpoint.

    Raises:
        ConfigError: listing every difference.
    """
    before, now = dict(_flat(theirs)), dict(_flat(ours))
    mistakes = [
        f"{key} was {before.get(key)!r} when {path} was saved and is {now.get(key)!r} now: set it back, choose "
        f'another output=, or allow it with checkpoint.allow_drift=["{key}"]'
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not any(key == a or key.startswith(f"{a}.") for a in allowed)
    ]
    if mistakes:
        raise ConfigError(*mistakes)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in tree.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return items
