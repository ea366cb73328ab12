"""Checkpoints: written aside by all ranks, hashed, and committed by one rename.

A directory `step-N` with a MANIFEST.json whose files are all there is a checkpoint; anything else is
not, and is never read. The order of things is what makes it safe: every rank's files are on disk before
the manifest is written, the manifest before the directory gets its name, the name before anything older
is removed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import dsprune
from dsprune.consolidate import FORMAT, read_manifest, render_manifest, sha256
from dsprune.engine.checkpoints.still_weights import save_still_weights
from dsprune.engine.learning.replica import Replica
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.config import engine_precision
from dsprune.engine.zero.shard_files import staying_in_step
from dsprune.errors import CheckpointError, OutputError
from dsprune.files import first_line, write_json
from dsprune.run_folder import MANIFEST, REPLICA, STATE, STATE_TENSORS, best_scored, checkpoint_name, is_checkpoint

__all__ = [
    "BYTES_PER_PARAMETER",
    "POINTS",
    "TAG",
    "CheckpointStore",
    "Snapshot",
    "free_bytes",
    "reached",
    "save_verification_batch",
]

logger = logging.getLogger(__name__)
TAG = "student"
"""Folder, within a checkpoint, of the weights: DeepSpeed's shards, or a stream of safetensors where none train."""
POINTS = (
    "begun",
    "cleared",
    "own shard written",
    "all written",
    "hashed",
    "manifest written",
    "committed",
    "retiring",
    "done",
)
"""What a save passes through, in this order, on every rank."""
HEADROOM = 1.1
"""A checkpoint may be so many times as large as the last one."""
BYTES_PER_PARAMETER = 16
"""Of a first checkpoint, at most: weights, fp32 masters and two moments."""
BYTES_PER_STILL_PARAMETER = 4
"""Of one whose weights do not train."""
DISK_FULL_SIGNS = ("iostream", "unexpected pos", "file write failed", "PytorchStreamWriter", "No space left")
"""What torch says where the system said that the disk is full."""


def reached(point: str) -> None:
    """Does nothing. A save calls it at each of `POINTS`, where tests cut it off."""


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
        provenance: where model and data came from, for the manifest.
    """

    step: int
    state: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    score: float | None
    describe: Callable[[Path], None]
    provenance: Mapping[str, Any]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


class CheckpointStore:
    """The checkpoints of one stage of a run."""

    def __init__(self, folder: Path, stage: str, world: World, *, keep: int, method: str | None) -> None:
        self.folder = folder
        self.stage = stage
        self.world = world
        self.keep = keep
        self.method = method

    # --- what is there ----------------------------------------------------------------------

    def named(self) -> list[Path]:
        """Directories that carry a checkpoint's name, oldest first: committed, and perhaps damaged since."""
        return sorted(path for path in self.folder.glob("*") if path.is_dir() and is_checkpoint(path))

    def committed(self) -> list[Path]:
        """Checkpoints whose manifest can be read, oldest first."""
        return [path for path in self.named() if _manifest(path) is not None]

    def newest(self) -> Path | None:
        """The newest checkpoint whose manifest can be read."""
        return next(reversed(self.committed()), None)

    def best(self) -> Path | None:
        """The checkpoint with the highest score; the newest one where none has a score."""
        return best_scored(self.committed()) or self.newest()

    def tidy(self) -> list[str]:
        """Put away what a save that was cut off left behind; returns what was found, in words. On one rank."""
        notes = []
        for path in sorted(self.folder.glob("*.old")):
            final = path.with_suffix("")
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)  # cut off between the two renames of a replacement
        for path in sorted(self.folder.glob("*.tmp")):
            notes.append(f"a save of {path.stem} was cut off and is discarded")
            shutil.rmtree(path)
        for path in self.folder.glob("*.trash"):
            shutil.rmtree(path, ignore_errors=True)
        return notes

    # --- saving -----------------------------------------------------------------------------

    def save(self, engine: Any, snapshot: Snapshot, replica: Replica | None) -> Path:
        """Write and commit one checkpoint; one of the same step is replaced. Collective: all ranks must call.

        Raises:
            OutputError: the disk is full or the folder cannot be written; what was committed before stays.
        """
        final = self.folder / checkpoint_name(snapshot.step)
        scratch = final.with_suffix(".tmp")
        reached("begun")
        with self._writing("preparing a checkpoint"):
            if self.world.is_main:
                self._make_room(engine, scratch)
        reached("cleared")
        with self._writing("writing a checkpoint"):
            if engine.basic_optimizer is None:
                save_still_weights(engine, scratch / TAG, self.world)
            else:
                with staying_in_step(engine):
                    engine.save_checkpoint(str(scratch), tag=TAG, save_latest=False)
            if self.world.is_main:
                self._write_own(engine, scratch, snapshot, replica)
            reached("own shard written")
        reached("all written")
        with self._writing("hashing a checkpoint"):
            share = self._hash_share(scratch)
        digests = {
            name: entry for part in self.world.gather(share, "collecting hashes") for name, entry in part.items()
        }
        reached("hashed")
        with self._writing("describing a checkpoint"):
            if self.world.is_main:
                self._write_manifest(engine, scratch, snapshot, digests)
        reached("manifest written")
        with self._writing("committing a checkpoint"):
            if self.world.is_main:
                self._commit(scratch, final)
        reached("committed")
        retired = self._retire() if self.world.is_main else []
        reached("retiring")
        for path in retired:
            shutil.rmtree(path, ignore_errors=True)  # what stays is put away by the next launch
        reached("done")
        return final

    @contextmanager
    def _writing(self, doing: str) -> Iterator[None]:
        """A step of saving, taken by all ranks or by none; what the system refuses becomes an `OutputError`."""
        with self.world.together(doing):
            try:
                yield
            except OSError as error:
                raise OutputError(self._refused(error.strerror or str(error))) from error
            except RuntimeError as error:
                if not any(sign in str(error) for sign in DISK_FULL_SIGNS):
                    raise
                raise OutputError(self._refused(first_line(error))) from error

    def _refused(self, reason: str) -> str:
        free = f"{_size(free_bytes(self.folder))} free there"
        return f"cannot write a checkpoint to {self.folder}: {reason} ({free}); the checkpoints before it are intact"

    def _make_room(self, engine: Any, scratch: Path) -> None:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        need, free = self._bytes_needed(engine), free_bytes(self.folder)
        if free < need:
            raise OutputError(
                f"cannot write a checkpoint to {self.folder}: it needs {_size(need)} and {_size(free)} are free; make "
                "room and start again, the checkpoints before it are intact"
            )
        scratch.mkdir()

    def _bytes_needed(self, engine: Any) -> int:
        newest = self.newest()
        if newest is not None:
            return int(HEADROOM * sum(entry["bytes"] for entry in read_manifest(newest)["files"].values()))
        count = sum(getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters())
        each = BYTES_PER_PARAMETER if engine.basic_optimizer is not None else BYTES_PER_STILL_PARAMETER
        return int(HEADROOM * each * count)

    def _write_own(self, engine: Any, scratch: Path, snapshot: Snapshot, replica: Replica | None) -> None:
        state = {"step": snapshot.step, **snapshot.state, "engine": _engine_state(engine)}
        write_json(scratch / STATE, state)
        if snapshot.tensors:
            save_file({k: v.contiguous() for k, v in snapshot.tensors.items()}, str(scratch / STATE_TENSORS))
        if replica is not None:
            replica.save(str(scratch / REPLICA))
        # For people and for DeepSpeed's own tools; dsprune never reads it.
        (scratch / "latest").write_text(TAG, encoding="utf-8")
        snapshot.describe(scratch)

    def _hash_share(self, scratch: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of this rank's share of the files, all files being on disk by now."""
        files = sorted(path for path in scratch.rglob("*") if path.is_file())
        share = files[self.world.rank :: self.world.size]
        for path in share:
            _fsync(path)
        return {str(p.relative_to(scratch)): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in share}

    def _write_manifest(self, engine: Any, scratch: Path, snapshot: Snapshot, digests: Mapping[str, Any]) -> None:
        facts = {
            "format": FORMAT,
            "dsprune": dsprune.__version__,
            "stage": self.stage,
            "method": self.method,
            "step": snapshot.step,
            "score": snapshot.score,
            "world_size": self.world.size,
            "zero_stage": engine.zero_optimization_stage(),
            "precision": engine_precision(engine),
            "torch": torch.__version__,
            "provenance": dict(snapshot.provenance),
            "files": dict(sorted(digests.items())),
        }
        _write_synced(scratch / MANIFEST, render_manifest(facts))
        for folder in (scratch, *(path for path in scratch.rglob("*") if path.is_dir())):
            _fsync(folder)

    def _commit(self, scratch: Path, final: Path) -> None:
        replaced = final.with_suffix(".old")
        if final.exists():
            final.rename(replaced)  # `tidy` turns it back, if the next rename is not reached
        scratch.rename(final)
        _fsync(self.folder)
        if replaced.exists():
            shutil.rmtree(replaced)

    def _retire(self) -> list[Path]:
        """Take the name off old checkpoints, in one rename each; the newest `keep` and the best stay."""
        best, retired = self.best(), []
        for path in self.committed()[: -self.keep]:
            if path != best:
                retired.append(path.rename(path.with_suffix(".trash")))
        return retired


def _manifest(path: Path) -> dict[str, Any] | None:
    try:
        return read_manifest(path)
    except CheckpointError:
        return None


def _engine_state(engine: Any) -> dict[str, Any]:
    """What a converted checkpoint cannot take from shards: counters, loss scale, order of the parameters."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    names = {param: name for name, param in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "param_groups", []) if engine.zero_optimization_stage() == 0 else []
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": {k: v for k, v in vars(scaler).items() if isinstance(v, (int, float))} if scaler else {},
        "groups": [[names.get(param, "") for param in group["params"]] for group in groups],
    }


def free_bytes(folder: Path) -> int:
    """Room on the disk where a folder is, or is to be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def save_verification_batch(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Write one real batch, for consolidation to compare masked and compact logits on."""
    save_file({name: tensor.cpu().to(torch.int64).contiguous() for name, tensor in inputs.items()}, str(path))
