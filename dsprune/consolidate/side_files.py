"""What stands in a model folder beside its weights: configuration, tokenizer, code if it needs some, and its card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsprune.consolidate.card import render_card
from dsprune.consolidate.compact import MODELING
from dsprune.errors import CheckpointError
from dsprune.run_folder import DESCRIPTION, FIGURES

__all__ = ["read_table", "write_side_files"]


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint that holds a table.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a table")
    return value


def write_side_files(checkpoint: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Write all but the weights of a model folder, and see everything in it safely on the disk.

    Args:
        checkpoint: that the model comes from.
        folder: with its weights.
        config: of the model, as `config.json` has it.

    Raises:
        CheckpointError: a file of the checkpoint cannot be read.
    """
    for path in (checkpoint / DESCRIPTION).iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name != "config.json":
            shutil.copy2(path, folder / path.name)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if "auto_map" in config:
        shutil.copy2(MODELING, folder / MODELING.name)
    if "dsprune" in config:
        (folder / "README.md").write_text(_card(checkpoint, folder, config), encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _card(checkpoint: Path, folder: Path, config: Mapping[str, Any]) -> str:
    figures, tokenizer = checkpoint / FIGURES, folder / "tokenizer_config.json"
    return render_card(
        config,
        read_table(figures) if figures.exists() else {},
        tokenizer=read_table(tokenizer).get("tokenizer_class") if tokenizer.exists() else None,
    )
