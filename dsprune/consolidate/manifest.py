"""Finding a committed checkpoint and seeing that it is whole."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsprune.errors import CheckpointError

__all__ = ["FORMAT", "check_files", "find_checkpoint", "read_manifest"]

FORMAT = 1
STAGES = ("prune", "recover", "teacher")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """MANIFEST.json of a committed checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = checkpoint / "MANIFEST.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} has no MANIFEST.json: it was never completed") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of a format that this version of dsprune does not know")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in files.values()
    ):
        raise CheckpointError(f"{path} does not list the checkpoint's files: it is damaged")
    return manifest


def find_checkpoint(source: str | Path, stage: str | None = None) -> Path:
    """The checkpoint that `source` names: itself, or the newest committed one of a run's stage.

    Args:
        source: a checkpoint (step-...) or a run folder.
        stage: stage of the run; by default prune.

    Raises:
        CheckpointError: nothing is there, or nothing was completed.
    """
    source = Path(source)
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist: give a run folder or a checkpoint of it")
    if (source / "MANIFEST.json").exists() or source.name.startswith("step-"):
        read_manifest(source)
        return source
    stage = stage or "prune"
    folder = source / stage / "checkpoints"
    committed = sorted(path.parent for path in folder.glob("step-*/MANIFEST.json") if path.parent.suffix != ".tmp")
    if committed:
        return committed[-1]
    there = sorted(path.name for path in folder.glob("step-*")) if folder.is_dir() else []
    what = f"holds only incomplete saves ({', '.join(there)})" if there else "holds no checkpoint"
    raise CheckpointError(f"{folder} {what}: let stage '{stage}' save one first")


def check_files(checkpoint: Path, manifest: dict[str, Any], *, hashes: bool) -> None:
    """See that every file of the manifest is there, of its size and, if asked, of its hash.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes and should have {entry['bytes']}: it is damaged")
    if not hashes:
        return
    # Hashing lets other threads run, and takes longer than everything else here on one core.
    with ThreadPoolExecutor() as threads:
        for name, digest in zip(files, threads.map(_sha256, (checkpoint / name for name in files)), strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{checkpoint / name} is not what was written: its hash differs")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
