"""The final choice of blocks, as consolidation reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsprune.errors import CheckpointError

__all__ = ["BlockSelection"]

KIND = "blocks"


@dataclass(frozen=True)
class BlockSelection:
    """Kept blocks of every matrix.

    Attributes:
        masks: by path of the linear, [block rows, block columns] of 0 and 1.
        block: rows and columns of a block.
    """

    masks: Mapping[str, Tensor]
    block: tuple[int, int]

    @property
    def gates(self) -> Mapping[str, Tensor]:
        """The masks: a block is kept whole, or not at all."""
        return self.masks

    def save(self, path: Path, **metadata: Any) -> None:
        """Write to a safetensors file; `metadata` values are kept as JSON."""
        text = {"kind": KIND, "block": json.dumps(self.block)}
        text |= {key: json.dumps(value) for key, value in metadata.items()}
        save_file({name: mask.float().contiguous() for name, mask in self.masks.items()}, path, metadata=text)

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a file holds a choice of blocks, and not one of units.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("kind") == KIND
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read the selection {path}: {error}") from error

    @classmethod
    def load(cls, path: Path) -> BlockSelection:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged or foreign file.
        """
        if not cls.is_at(path):
            raise CheckpointError(f"{path} is not a selection of blocks")
        with safe_open(path, framework="pt") as file:
            block = json.loads((file.metadata() or {})["block"])
            masks = {name: file.get_tensor(name) for name in file.keys()}
        if not all(((mask == 0) | (mask == 1)).all() for mask in masks.values()):
            raise CheckpointError(f"{path} holds an impossible selection: blocks are kept or not")
        return cls(masks, (int(block[0]), int(block[1])))
