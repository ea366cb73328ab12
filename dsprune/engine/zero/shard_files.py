"""DeepSpeed's checkpoint files without their risks.

Its loader unpickles whatever a file holds; here only weights and plain values pass. Its saver lets a
rank that cannot write leave while the others wait in a collective; here it stays in step and says so after.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

__all__ = ["only_weights", "staying_in_step"]

ALLOWED = [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]
"""Classes of values that shards hold beside tensors; they hold numbers and run nothing of a file's choosing."""


@contextmanager
def only_weights(engine: Any) -> Iterator[None]:
    """While in force, an engine's checkpoint files are read with `weights_only=True`."""

    def load(path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(ALLOWED):  # type: ignore[arg-type]
            return torch.load(path, map_location=map_location, weights_only=True)

    engine.checkpoint_engine.load = load
    try:
        yield
    finally:
        del engine.checkpoint_engine.load


@contextmanager
def staying_in_step(engine: Any) -> Iterator[None]:
    """While in force, an error while writing a shard is held back until the engine's own collectives are over.

    The scripts that DeepSpeed puts beside its shards are not written: they know nothing of gates, and rank 0 would
    leave over a full disk while it copies them.
    """
    errors: list[Exception] = []
    write = engine.checkpoint_engine.save

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except Exception as error:
            errors.append(error)

    engine.checkpoint_engine.save = save
    engine._copy_recovery_script = lambda path: None
    try:
        yield
    finally:
        del engine.checkpoint_engine.save, engine._copy_recovery_script
    if errors:
        raise errors[0]
