"""Checkpoints: written aside by all ranks, hashed, and committed by one rename.

A directory with a MANIFEST.json whose files are all there is a checkpoint; anything else is not, and
is never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsprune
from dsprune.consolidate import read_manifest
from dsprune.engine.journal import write_json
from dsprune.engine.replica import Replica
from dsprune.engine.world import World
from dsprune.errors import CheckpointError, OutputError

__all__ = ["CheckpointStore", "Snapshot", "sha256"]

logger = logging.getLogger(__name__)
FORMAT = 1
TAG = "student"


@dataclass
class Snapshot:
    """What a stage saves beside the engine.

    Attributes:
        step: optimizer steps done.
        state: small JSON values that resuming needs.
        tensors: small tensors that resuming needs (the last layer distances).
        score: the evaluation metric that picks the best checkpoint, if one was just measured.
        describe: writes the model's own files (configuration, tokenizer, selection, a batch to
            verify on, figures) into the directory; called on rank 0 only.
    """

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    score: float | None
    describe: Callable[[Path], None]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointStore:
    """The checkpoints of one stage of a run."""

    def __init__(self, folder: Path, stage: str, world: World, *, keep: int, method: str | None) -> None:
        self.folder = folder
        self.stage = stage
        self.world = world
        self.keep = keep
        self.method = method

    def committed(self) -> list[Path]:
        """Committed checkpoints, oldest first."""
        return sorted(path.parent for path in self.folder.glob("step-*/MANIFEST.json"))

    def save(self, engine: Any, snapshot: Snapshot, replica: Replica | None) -> Path:
        """Write and commit one checkpoint. Collective: all ranks must call.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        final = self.folder / f"step-{snapshot.step:08d}"
        scratch = final.with_name(f"{final.name}.tmp")
        if final.exists():
            return final
        with self.world.together("preparing a checkpoint"), _told_as_output_error(self.folder):
            if self.world.is_main:
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
        with self.world.together("writing a checkpoint"), _told_as_output_error(self.folder):
            engine.save_checkpoint(str(scratch), tag=TAG, save_latest=False)
            if self.world.is_main:
                self._write_own(scratch, snapshot, replica)
        with self.world.together("hashing a checkpoint"):
            digests = {k: v for part in self.world.gather(self._hash_share(scratch)) for k, v in part.items()}
        with self.world.together("committing a checkpoint"), _told_as_output_error(self.folder):
            if self.world.is_main:
                self._commit(engine, scratch, final, snapshot, digests)
                self._retire()
        return final

    def _write_own(self, scratch: Path, snapshot: Snapshot, replica: Replica | None) -> None:
        write_json(scratch / "state.json", {"step": snapshot.step, **snapshot.state})
        if snapshot.tensors:
            save_file({k: v.contiguous() for k, v in snapshot.tensors.items()}, str(scratch / "state.safetensors"))
        if replica is not None:
            replica.save(str(scratch / "replica.safetensors"))
        snapshot.describe(scratch)

    def _hash_share(self, scratch: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of this rank's share of the files, all files being on disk by now."""
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        share = files[self.world.rank :: self.world.size]
        for path in share:
            _fsync(path)
        return {str(p.relative_to(scratch)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in share}

    def _commit(self, engine: Any, scratch: Path, final: Path, snapshot: Snapshot, digests: Mapping[str, Any]) -> None:
        manifest = {
            "format": FORMAT,
            "dsprune": dsprune.__version__,
            "stage": self.stage,
            "method": self.method,
            "step": snapshot.step,
            "score": snapshot.score,
            "world_size": self.world.size,
            "zero_stage": engine.zero_optimization_stage(),
            "files": dict(sorted(digests.items())),
        }
        write_json(scratch / "MANIFEST.json", manifest)
        _fsync(scratch)
        scratch.rename(final)
        _fsync(self.folder)

    def _retire(self) -> None:
        """Remove old checkpoints; the newest `keep` and the best stay."""
        committed = self.committed()
        best = self.best()
        for path in committed[: -self.keep]:
            if path != best:
                shutil.rmtree(path)

    def best(self) -> Path | None:
        """The checkpoint with the highest score; the newest one where none has a score."""
        scored = [(score, path) for path in self.committed() if (score := read_manifest(path).get("score")) is not None]
        if scored:
            return max(scored, key=lambda pair: (pair[0], pair[1].name))[1]
        committed = self.committed()
        return committed[-1] if committed else None

    def load_newest(self, engine: Any, replica: Replica | None) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Restore the newest checkpoint: its state and tensors; None where the stage has none. Collective.

        Raises:
            CheckpointError: it is damaged, or was written by another world size or ZeRO stage.
        """
        newest = self.world.broadcast(self.committed()[-1] if self.committed() else None)
        if newest is None:
            return None
        with self.world.together(f"reading checkpoint {newest}"):
            self._check(newest, engine)
        with self.world.together(f"loading checkpoint {newest}"):
            # The engine unpickles: only files whose hashes are those that dsprune wrote get here.
            engine.load_checkpoint(str(newest), tag=TAG, load_lr_scheduler_states=False)
            if replica is not None:
                replica.load(str(newest / "replica.safetensors"))
        state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
        tensors = newest / "state.safetensors"
        return state, load_file(str(tensors)) if tensors.exists() else {}

    def _check(self, path: Path, engine: Any) -> None:
        manifest = read_manifest(path)
        theirs = (manifest["world_size"], manifest["zero_stage"])
        ours = (self.world.size, engine.zero_optimization_stage())
        if theirs != ours:
            raise CheckpointError(
                f"{path} was written by {theirs[0]} ranks at ZeRO stage {theirs[1]}, and this launch has {ours[0]} at "
                f"stage {ours[1]}: launch as before, or use a new output folder"
            )
        for name, entry in list(manifest["files"].items())[self.world.rank :: self.world.size]:
            file = path / name
            if not file.exists() or file.stat().st_size != entry["bytes"] or sha256(file) != entry["sha256"]:
                raise CheckpointError(f"{file} is missing or damaged: remove {path} to go on from an older checkpoint")


class _told_as_output_error:
    """Turn an OSError while writing into one clear line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError):
            raise OutputError(f"cannot write a checkpoint to {self.folder}: {error.strerror or error}") from error


def save_verification_batch(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Write one real batch, for consolidation to compare masked and compact logits on."""
    save_file({name: tensor.cpu().to(torch.int64).contiguous() for name, tensor in inputs.items()}, str(path))
