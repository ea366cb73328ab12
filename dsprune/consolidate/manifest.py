"""Finding a committed checkpoint and seeing that it is whole."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsprune.errors import CheckpointError
from dsprune.run_folder import CHECKPOINT_PREFIX, MANIFEST, RunFolder, StageName

__all__ = ["FORMAT", "check_files", "find_checkpoint", "read_manifest", "render_manifest", "sha256"]

FORMAT = 2
"""Format of checkpoints that this version writes and reads; no other was ever released."""


def render_manifest(facts: dict[str, Any]) -> str:
    """Text of a manifest, with a digest of itself in it: there is exactly one text for the same facts."""
    digest = hashlib.sha256(_canonical(facts).encode()).hexdigest()
    return _canonical({**facts, "digest": digest})


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """MANIFEST.json of a committed checkpoint; a change of any byte of it is noticed.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
    """
    path = checkpoint / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest: dict[str, Any] = json.loads(text)
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint} has no {MANIFEST}: it was never completed") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{path} is not the manifest of a checkpoint: it is damaged")
    if manifest["format"] != FORMAT:
        writer = f"dsprune {manifest.get('dsprune', 'of an unknown version')}"
        raise CheckpointError(
            f"{path} is of format {manifest['format']}, written by {writer}, and this version reads format {FORMAT}: "
            "use the version that wrote it"
        )
    if render_manifest({key: value for key, value in manifest.items() if key != "digest"}) != text:
        raise CheckpointError(f"{path} is not what was written: its digest differs")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and {"bytes", "sha256"} <= set(e) for e in files.values()
    ):
        raise CheckpointError(f"{path} does not list the checkpoint's files: it is damaged")
    return manifest


def find_checkpoint(source: str | Path, stage: StageName = "prune") -> Path:
    """The checkpoint that `source` names: itself, or the one of a run's stage that the run exports.

    Args:
        source: a checkpoint (step-...) or a run folder.
        stage: of the run.

    Raises:
        CheckpointError: nothing is there, or nothing was completed.
    """
    source = Path(source)
    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist: give a run folder or a checkpoint of it")
    if (source / MANIFEST).exists() or source.name.startswith(CHECKPOINT_PREFIX):
        read_manifest(source)
        return source
    return RunFolder(source).chosen_checkpoint(stage)


def check_files(checkpoint: Path, manifest: dict[str, Any], *, hashes: bool, share: tuple[int, int] = (0, 1)) -> None:
    """See that files of the manifest are there, of their size and, if asked, of their hash.

    Args:
        checkpoint: the folder.
        manifest: what `read_manifest` made of its manifest file.
        hashes: read and hash the files, too.
        share: (i, n) looks at every n-th file from the i-th on, for n processes that check together.

    Raises:
        CheckpointError: naming the first file that is not.
    """
    entries = sorted(manifest["files"].items())[share[0] :: share[1]]
    files: dict[str, dict[str, Any]] = dict(entries)
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
        for name, digest in zip(files, threads.map(sha256, (checkpoint / name for name in files)), strict=True):
            if digest != files[name]["sha256"]:
                raise CheckpointError(f"{checkpoint / name} is not what was written: its hash differs")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
